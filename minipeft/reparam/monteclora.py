"""MonteCLoRA: LoRA whose A is drawn around its mean at every training step.

Paper      Seth et al., "Robust and Efficient Fine-tuning of LLMs with Bayesian
           Reparameterization of Low-Rank Adaptation", TMLR 2025, arXiv:2411.04358v3.

Idea       A single A is one point. Train a cloud around it, and learn how wide
           the cloud is: what works for the whole cloud should depend less on
           learning rate and batch size. At evaluation the mean is left: LoRA.

Math       x (..., d_in)   W (d_out, d_in)   A (r, d_in)   B (d_out, r)
           sigma (r) and alpha (N) are trained through their logarithms.

               Sigma ~ Wishart(r, diag(sigma^2))      its diagonal is kept
               pi    ~ Dirichlet(alpha)               N weights, sum 1
               Z_n   ~ N(0, Sigma) in every column    (r, d_in), n = 1..N
               A~    = A + eps sum_n pi_n Z_n
               y     = x W' + b + s (x A~') B'        s = LoRA's alpha / r

           Given pi, N averaged draws have the law of one draw times ||pi||, and
           Sigma_jj is sigma_j^2 chi2(r), row by row. So, with xi ~ N(0, 1),

               A~_ji - A_ji = eps ||pi|| sigma_j sqrt(chi2_j) xi_ji
               its variance = eps^2 r sigma_j^2 E||pi||^2

           penalty = mean over layers of  kl (KL_D + KL_W + KL_G) + coop E||pi||^2
           KL_D = KL(Dirichlet(alpha) || Dirichlet(prior))
           KL_W = r/2 sum_j (sigma_j^2 - log sigma_j^2 - 1)
           KL_G = N/2 E sum_j (Sigma_jj - log Sigma_jj - 1)

Steps      1. Freeze the model, put MonteCLoRALinear around each chosen layer.
           2. In train mode every forward draws A~; eval uses A itself.
           3. Minimise loss + penalty(model) over A, B, sigma and alpha.
           4. Merge as LoRA: W <- W + s B A.

Cost       LoRA's, with r + N more trained numbers per layer and one draw of the
           size of A per forward. Nothing at inference.

Differs    One draw in the place of N: the same law, no buffers. KL_G and E||pi||^2
           are exact means; the authors' code takes its last draw and floors Sigma
           at 0.001. pi is an exact Dirichlet; theirs is a logistic-normal (here
           logistic=True). full=True keeps all of Sigma. Their KL_D has a wrong
           sign; their repository makes A a new parameter in every forward, which
           its optimiser does not know.

Pitfalls   - The noise is as large as A at eps = 0.5 / (r d_in)^0.5, about, for N = 4.
             The default, Hugging Face's 1e-4, changes almost nothing.
           - Without the penalty nothing holds sigma and alpha.
           - The mean output is LoRA's, for one layer. The mean loss is not: the
             squared loss grows by exactly the output's variance.
           - eps is a setting of the training, as dropout is: not in the state.
"""

from collections import Counter
from math import log

import torch
from torch import Tensor, nn
from torch.distributions import Chi2, Dirichlet
from torch.nn import functional as F

try:  # GPT-2's linear layer: its weight is (d_in, d_out)
    from transformers.pytorch_utils import Conv1D
except ImportError:  # torch alone is enough for everything else
    Conv1D = nn.Linear

KINDS = (nn.Linear, Conv1D)


class MonteCLoRALinear(nn.Module):
    """y = base(x) + s (x A~') B'; A~ is a draw around A in train mode, A itself in eval mode."""

    weight = property(lambda self: self.base.weight.new_empty(0))  # a dtype for T5, no numbers

    def __init__(self, base, r, alpha, samples=4, eps=1e-4, logistic=False, full=False):
        super().__init__()
        d_out, d_in = _shape(base)
        if not 1 <= r <= min(d_in, d_out):
            raise ValueError(f"r = {r}: the rank must lie in 1..{min(d_in, d_out)} here")
        if samples < 1 or eps < 0:
            raise ValueError(f"samples = {samples}, eps = {eps}: expected at least 1 and 0")
        W, bound = base.weight, d_in**-0.5
        # Half-precision weights get float32 factors: a small step must not round away.
        dtype = W.dtype if W.dtype in (torch.float32, torch.float64) else torch.float32
        # Drawn on the CPU, so that a seed gives the same A on every device.
        A = torch.empty(r, d_in, dtype=dtype).uniform_(-bound, bound)
        self.base = base
        self.A = nn.Parameter(A.to(W.device))
        self.B = nn.Parameter(torch.zeros(d_out, r, dtype=dtype, device=W.device))
        self.log_sigma = nn.Parameter(torch.rand(r, dtype=dtype).to(W.device))
        self.log_alpha = nn.Parameter(torch.rand(samples, dtype=dtype).to(W.device))
        self.s, self.eps, self.logistic, self.full = alpha / r, eps, logistic, full

    def forward(self, x: Tensor) -> Tensor:  # (..., d_in) -> (..., d_out)
        y = self.base(x)
        A = self.A + self.noise() if self.training and self.eps else self.A
        z = F.linear(x, A.to(x.dtype))  # (..., r)
        return y + F.linear(z, self.B.to(x.dtype)) * self.s

    def noise(self) -> Tensor:
        """One draw of A~ - A, shape (r, d_in); gradients reach sigma and alpha through it."""
        sigma = _exp(self.log_sigma)[:, None]  # (r, 1)
        L = sigma * _bartlett(sigma)  # (r, r) lower; L L' is Sigma
        z = torch.randn(self.A.shape, dtype=L.dtype, device=L.device)
        rows = L @ z if self.full else L.norm(dim=1, keepdim=True) * z
        return self.eps * self.mixture().norm() * rows

    def mixture(self) -> Tensor:
        """One draw of pi, (N,)."""
        a = _exp(self.log_alpha)
        if not self.logistic:
            return Dirichlet(a, validate_args=False).rsample()
        var = (1 - 2 / len(a)) / a + (1 / a).sum() / len(a) ** 2
        return (a.log() - a.log().mean() + var.sqrt() * torch.randn_like(a)).softmax(0)

    def divergences(self, prior: float = 1.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """KL_D, KL_W, KL_G and E||pi||^2."""
        a, var = _exp(self.log_alpha), _exp(self.log_sigma) ** 2
        b, total, r = torch.full_like(a, prior), a.sum(), len(var)
        kl_d = total.lgamma() - b.sum().lgamma() - (a.lgamma() - b.lgamma()).sum()
        kl_d = kl_d + ((a - b) * (a.digamma() - total.digamma())).sum()
        kl_w = (var - var.log() - 1).sum() * r / 2
        # log chi2(k) has the mean psi(k / 2) + log 2; k falls from r to 1 in det Sigma.
        k = torch.arange(r, 0, -1).to(var) if self.full else torch.full_like(var, r)
        kl_g = (r * var - var.log() - (k / 2).digamma() - log(2) - 1).sum() * len(a) / 2
        return kl_d, kl_w, kl_g, (a * (a + 1)).sum() / (total * (total + 1))


def attach(
    model: nn.Module,
    *targets: str,
    r: int = 8,
    alpha: float = 16.0,
    samples: int = 4,
    eps: float = 1e-4,
    logistic: bool = False,
    full: bool = False,
    freeze: bool = True,
) -> list[str]:
    """Freeze `model`; wrap every linear layer that `targets` name; return their paths.

    ValueError: a target that names no linear layer, or r, samples or eps out of range;
    the model is then as it was. freeze=False leaves every requires_grad as it is.
    """
    paths = _find(model, targets)
    kw = (r, alpha, samples, eps, logistic, full)
    new = {p: MonteCLoRALinear(model.get_submodule(p), *kw) for p in paths}
    if freeze:
        model.requires_grad_(False)
    for path, layer in new.items():
        layer.train(model.training)
        _put(model, path, layer)
    return paths


def sites(model: nn.Module) -> dict[str, MonteCLoRALinear]:
    """{path: layer}, found by type and never by a substring of a name."""
    return {p: m for p, m in model.named_modules() if isinstance(m, MonteCLoRALinear)}


def penalty(model: nn.Module, kl: float = 1e-5, coop: float = 1.0, prior: float = 1.0) -> Tensor:
    """What to add to the task's loss: a function of sigma and alpha alone, mean over the sites."""
    each = []
    for m in sites(model).values():
        *kls, square = m.divergences(prior)
        each.append(kl * sum(kls) + coop * square)
    if not each:
        raise ValueError("the model has no MonteCLoRA layer: attach it first")
    return torch.stack([e.to(each[0].device) for e in each]).mean()


def state(model: nn.Module) -> dict[str, Tensor]:
    """What was learned and nothing else: a copy of the four parameters and s of every site."""
    saved = {}
    for path, m in sites(model).items():
        saved |= {f"{path}.{n}": p.detach().clone() for n, p in m.named_parameters(recurse=False)}
        saved[f"{path}.s"] = torch.tensor(m.s, dtype=torch.float64)  # A, B mean nothing without it
    return saved


@torch.no_grad()
def load(model: nn.Module, saved: dict[str, Tensor]) -> None:
    """Inverse of `state`, on a model with the same sites attached; all or nothing.

    KeyError: other names. ValueError: a wrong shape (another r or samples), a selection on it.
    """
    _check(sites(model), state(model), saved)
    for path, m in sites(model).items():
        for name, p in m.named_parameters(recurse=False):
            p.copy_(saved[f"{path}.{name}"])
        m.s = saved[f"{path}.s"].item()


@torch.no_grad()
def merge(model: nn.Module) -> dict[str, float]:
    """Fold dW into W and put the plain layers back. Cannot be undone.

    Returns {path: largest rounding error of one weight}, in the weight's own unit.
    ValueError: W is tied to another module, which would change with it.
    """
    held = Counter(id(x) for m in model.modules() for x in (*m.children(), *m._parameters.values()))
    for path, m in sites(model).items():
        if max(held[id(m.base)], held[id(m.base.weight)]) > 1:
            raise ValueError(f"{path}: its weight is shared with another module; untie it first")
    rounding = {}
    for path, m in sites(model).items():
        W = m.base.weight
        dW = m.s * (m.B.double() @ m.A.double())  # (d_out, d_in)
        exact = W.double() + (dW if isinstance(m.base, nn.Linear) else dW.T)
        W.copy_(exact)
        rounding[path] = (W.double() - exact).abs().max().item()
        _put(model, path, m.base)
    return rounding


def detach(model: nn.Module) -> None:
    """Put the plain layers back. W was never touched: the base, bit for bit."""
    for path, m in sites(model).items():
        _put(model, path, m.base)


def _find(model: nn.Module, targets: tuple[str, ...]) -> list[str]:
    """Paths of the linear layers whose name, or dotted end of path, is a target."""
    seen = {t: [] for t in targets}
    for path, m in model.named_modules():
        for t in targets:
            if path == t or path.endswith("." + t):
                if not isinstance(m, KINDS):
                    raise ValueError(f"{path} is a {type(m).__name__}, expected a linear layer")
                seen[t].append(path)
    if not targets or not all(seen.values()):
        names = {p.rpartition(".")[2]: 0 for p, m in model.named_modules() if isinstance(m, KINDS)}
        lost = ", ".join(repr(t) for t in targets if not seen[t]) or "nothing"
        raise ValueError(f"no linear layer is named {lost}; there are: {', '.join(names) or 'none'}")
    found = {p for paths in seen.values() for p in paths}
    return [p for p, _ in model.named_modules() if p in found]


def _shape(base: nn.Module) -> tuple[int, int]:
    """(d_out, d_in)."""
    shape = base.weight.shape
    return tuple(shape) if isinstance(base, nn.Linear) else tuple(shape)[::-1]


def _exp(t: Tensor) -> Tensor:
    """In float32 at least: a bfloat16 model draws as well as any other."""
    return t.to(torch.promote_types(t.dtype, torch.float32)).exp()


def _bartlett(like: Tensor) -> Tensor:
    """Lower triangular (r, r), r = len(like): L L' is a draw of Wishart(r, I), with no Cholesky."""
    r = len(like)
    chi2 = Chi2(torch.arange(r, 0, -1).to(like), validate_args=False).sample()
    return torch.randn(r, r, dtype=like.dtype, device=like.device).tril(-1) + chi2.sqrt().diag()


def _check(places: dict, mine: dict[str, Tensor], saved: dict[str, Tensor]) -> None:
    if held := [p for p, m in places.items() if hasattr(m, "parametrizations")]:
        raise ValueError(f"{held[0]} holds a selection, expected plain tensors: detach that first")
    if odd := sorted(mine.keys() ^ saved.keys()):
        raise KeyError(f"only in one of model and file: {odd}")
    if bad := [k for k in mine if mine[k].shape != saved[k].shape]:
        k = bad[0]
        raise ValueError(f"{k} has shape {tuple(saved[k].shape)}, expected {tuple(mine[k].shape)}")


def _put(model: nn.Module, path: str, new: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, new)


if __name__ == "__main__":  # python monteclora.py: the claims above, checked on a toy
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)), torch.randn(4, 6)
    before = model(x)
    attach(model, "0", "2", r=2, eps=0.1)
    assert torch.equal(model.train()(x), before), "B = 0: step 0 is the base, noise or not"
    opt = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(3):
        opt.zero_grad()
        (model(x).square().sum() + penalty(model)).backward()
        opt.step()
    assert not torch.equal(model(x), model(x)), "train mode draws"
    tuned = model.eval()(x)
    assert torch.equal(model(x), tuned), "eval mode does not"
    merge(model)
    assert torch.allclose(model(x), tuned, atol=1e-6) and not torch.allclose(tuned, before)
    print("monteclora: ok")
