"""lora.py against the formula in float64, merging, adapter files, and peft as oracle of the export."""
import pytest
import torch
import torch.nn as nn

import data
import lora
import mrm


def random_layer(parts=(True, False, True), rank=3, bias=True, seed=0):
    torch.manual_seed(seed)
    layer = lora.LoRALinear(10, 12, rank, alpha=8, dropout=0.0, parts=parts, bias=bias)
    nn.init.normal_(layer.lora_B)  # at initialisation B is zero and LoRA is never seen
    return layer


def formula(layer, x):
    """y = x W^T + b + (alpha / r) x A_g^T B_g^T on the columns of each adapted part, in float64, part by part."""
    W, A, B = (p.double() for p in (layer.weight, layer.lora_A, layer.lora_B))
    y = x.double() @ W.T + (layer.bias.double() if layer.bias is not None else 0)
    size, r, g, parts = len(W) // len(layer.parts), layer.rank, 0, []
    for p, on in enumerate(layer.parts):
        columns = y[..., p * size : (p + 1) * size]
        if on:
            columns = columns + 8 / r * (x.double() @ A[g * r : (g + 1) * r].T) @ B[g * size : (g + 1) * size].T
            g += 1
        parts.append(columns)
    return torch.cat(parts, -1)


@pytest.mark.parametrize("parts", [(True,), (True, False, True), (False, True), (True, True, True)])
@pytest.mark.parametrize("bias", [True, False])
def test_forward_and_gradients_against_float64(parts, bias):
    layer, x = random_layer(parts, bias=bias), torch.randn(2, 5, 10, requires_grad=True)
    y, expected, weights = layer(x), formula(layer, x), torch.randn(2, 5, 12)
    torch.testing.assert_close(y.double(), expected, atol=1e-5, rtol=1e-5)
    wrt = (x, layer.lora_A, layer.lora_B)
    ours = torch.autograd.grad((y * weights).sum(), wrt)
    theirs = torch.autograd.grad((expected * weights).sum(), wrt)
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=2e-5)


def test_med_pefts_shapes_and_errors():
    layer = random_layer(rank=3)
    assert layer.lora_A.shape == (2 * 3, 10) and layer.lora_B.shape == (2 * 12 // 3, 3)
    for arguments in (dict(rank=0), dict(rank=2, parts=(False, False)), dict(rank=2, parts=(True,) * 5)):
        with pytest.raises(ValueError, match="LoRA needs rank"):
            lora.LoRALinear(10, 12, **arguments)


def vit(seed=0, **kwargs):
    torch.manual_seed(seed)
    return mrm.ViT(**dict(img_size=16, patch_size=4, embed_dim=24, depth=2, num_heads=3, num_classes=3) | kwargs)


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


def test_merging_is_the_same_model_once_and_back():
    model, images = trained(lora.add_lora(vit(), rank=2)).eval(), torch.randn(4, 1, 16, 16)
    weights = [layer.weight.detach().clone() for layer in lora.lora_layers(model)]
    before = model(images)
    lora.merge_lora(model)
    torch.testing.assert_close(model(images), before, atol=2e-6, rtol=1e-5)
    once = [layer.weight.detach().clone() for layer in lora.lora_layers(model)]
    lora.merge_lora(model.train().eval())  # neither a second call nor train() and eval() add the delta again
    for layer, weight, plain in zip(lora.lora_layers(model), once, weights):
        assert torch.equal(layer.weight, weight)
        k = slice(24, 48)
        assert torch.equal(weight[k], plain[k]) and not torch.equal(weight, plain)  # k is not adapted
    lora.unmerge_lora(model)
    for layer, weight in zip(lora.lora_layers(model), weights):
        torch.testing.assert_close(layer.weight, weight, atol=1e-7, rtol=1e-6)
    torch.testing.assert_close(model(images), before, atol=2e-6, rtol=1e-5)


def test_dropout_is_on_in_training_alone():
    layer, x = random_layer(), torch.randn(64, 10)
    layer.dropout = 0.5
    assert not torch.equal(layer.train()(x), layer(x))
    assert torch.equal(layer.eval()(x), layer(x))


def test_adapter_round_trip_and_size(tmp_path):
    model = trained(lora.add_lora(vit(embed_dim=192, depth=6, num_heads=6), rank=2)).eval()
    images = torch.randn(2, 1, 16, 16)
    lora.save_adapter(tmp_path / "adapter.pt", model, classes=["a", "b", "c"])
    data.save_checkpoint(tmp_path / "full.pt", model.state_dict())
    assert (tmp_path / "adapter.pt").stat().st_size < 0.02 * (tmp_path / "full.pt").stat().st_size
    again = vit(embed_dim=192, depth=6, num_heads=6).eval()
    assert lora.load_adapter(again, tmp_path / "adapter.pt")["classes"] == ["a", "b", "c"]
    assert torch.equal(again(images), model(images))


def test_adapters_that_do_not_fit_are_refused(tmp_path):
    lora.save_adapter(tmp_path / "adapter.pt", lora.add_lora(vit(), rank=2))
    with pytest.raises(data.InputError, match="adapter.pt: .*does not fit the model"):
        lora.load_adapter(vit(embed_dim=48), tmp_path / "adapter.pt")
    data.save_checkpoint(tmp_path / "model.pt", {"model": vit().state_dict()})
    with pytest.raises(data.InputError, match="model.pt: expected an adapter"):
        lora.load_adapter(vit(), tmp_path / "model.pt")
    saved = data.load_checkpoint(tmp_path / "adapter.pt")
    del saved["adapter"]["head.weight"]
    data.save_checkpoint(tmp_path / "part.pt", saved)
    with pytest.raises(data.InputError, match="1 tensors of the adapter are missing, head.weight first"):
        lora.load_adapter(vit(), tmp_path / "part.pt")


def test_merge_command_writes_the_same_model_as_a_plain_vit(tmp_path):
    base, images = vit(), torch.randn(2, 1, 16, 16)
    data.save_checkpoint(tmp_path / "base.pt", {"model": base.state_dict()})
    model = trained(lora.add_lora(base, rank=2)).eval()
    lora.save_adapter(tmp_path / "adapter.pt", model, weights=str(tmp_path / "base.pt"))
    lora.merge(lora.LoRAConfig(adapter=str(tmp_path / "adapter.pt")))
    plain = vit(seed=5).eval()
    plain.load_state_dict(data.load_checkpoint(tmp_path / "merged.pt")["model"])
    torch.testing.assert_close(plain(images), model(images), atol=2e-6, rtol=1e-5)


def test_export_is_read_by_peft(tmp_path):
    peft = pytest.importorskip("peft")
    base, images = vit(), torch.randn(2, 1, 16, 16)
    data.save_checkpoint(tmp_path / "base.pt", {"model": base.state_dict()})
    model = trained(lora.add_lora(base, rank=2)).eval()
    lora.save_adapter(tmp_path / "adapter.pt", model, weights=str(tmp_path / "base.pt"))
    lora.export_peft(lora.LoRAConfig(adapter=str(tmp_path / "adapter.pt"), out=str(tmp_path / "peft")))
    theirs = peft.PeftModel.from_pretrained(vit(), str(tmp_path / "peft")).eval()
    torch.testing.assert_close(theirs(images), model(images), atol=2e-6, rtol=1e-5)
