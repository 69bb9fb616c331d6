"""How far rounding alone may take a result: the tolerances of tests that compare numbers.

They follow from what is added up, so that they hold on every processor. A sum of n products errs
by up to n/2 eps times the sum of their absolute values, and by some sqrt(n)/2 eps of it where the
roundings do not conspire; FMA, the width of vectors and the order of adding change it within that.
"""

import torch


def rounding(dtype, terms, factor=4):
    """factor x eps of `dtype` x the largest of `terms`, sums of absolute values."""
    terms = torch.as_tensor(terms).detach()
    return factor * torch.finfo(dtype).eps * terms.double().abs().max().item()


def assert_rounded(got, truth, terms=None, factor=4, name="result"):
    """`got` is `truth` but for rounding in the dtype of `got`. terms: the sum of absolute values
    that were added for each number, or for the largest; None: the values of truth themselves,
    where these are an average or a copy, or no sums cancel."""
    allowed = rounding(got.dtype, truth if terms is None else terms, factor)
    error = (got.detach().double() - truth.detach().double()).abs().max().item()
    assert got.shape == truth.shape
    assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


def network_rounding(module, run, factor=16):
    """How far rounding may take the tensor run() that comes out of `module`: factor times what it
    moves by when every parameter is moved by one rounding, up or down. The largest of 3 draws."""
    state = {name: p.detach().clone() for name, p in module.named_parameters()}
    generator, moved = torch.Generator().manual_seed(0), 0.0
    with torch.no_grad():
        before = run().double()
        for _ in range(3):
            for name, p in module.named_parameters():
                sign = torch.randint(2, p.shape, generator=generator) * 2 - 1
                p.copy_(state[name] * (1 + torch.finfo(p.dtype).eps * sign))
            moved = max(moved, (run().double() - before).abs().max().item())
        for name, p in module.named_parameters():
            p.copy_(state[name])
    return factor * moved
