"""
Optimizers. `muon`: Muon for the matrices of all transformer blocks and the projector, AdamW for everything else. `adamw`: AdamW throughout, as
published. Both are one object with one `step`, and a state that is a flat dict of named tensors (for safetensors).
"""
import math

import torch


@torch.no_grad()
def orthogonalize(G, dtype, steps=5):
    """
    Nearest semi-orthogonal matrices to a stack (N, a, b), roughly: singular values land in about [0.7, 1.2].
    Newton-Schulz with the quintic coefficients of Muon (Keller Jordan, 2024); N matrices in one batched product.
    """
    X = G.to(dtype)
    if tall := X.size(1) > X.size(2):
        X = X.mT
    X = X / (X.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        A = X @ X.mT
        B = torch.baddbmm(A, A, A, beta=-4.7750, alpha=2.0315)
        X = torch.baddbmm(X, B, X, beta=3.4445)
    return (X.mT if tall else X).to(G.dtype)


class Muon(torch.optim.Optimizer):
    """
    Momentum (Nesterov), then orthogonalised. A fused qkv of shape (3C, C) is three matrices. Matrices of one shape go
    through Newton-Schulz together. The step is scaled by sqrt(max(1, rows / columns)).
    """
    def __init__(self, params, lr, momentum=0.95, dtype=torch.float32):
        super().__init__(params, dict(lr=lr, momentum=momentum))
        self.dtype = dtype

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            stacks = {}
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            for p in params:
                if "momentum" not in self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
            buffers = [self.state[p]["momentum"] for p in params]
            grads = [p.grad for p in params]
            torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
            for p, u in zip(params, torch._foreach_lerp(grads, buffers, group["momentum"])):
                for piece, out in zip(*(t.chunk(3) if p.size(0) == 3 * p.size(1) else (t,) for t in (u, p))):
                    stacks.setdefault(piece.shape, []).append((piece, out))
            for (rows, cols), pairs in stacks.items():
                updates = orthogonalize(torch.stack([u for u, _ in pairs]), self.dtype)
                torch._foreach_add_([p for _, p in pairs], list(updates.unbind()), alpha=-group["lr"] * max(1, rows / cols) ** 0.5)


def is_block_matrix(name, p):
    return p.ndim == 2 and "rel_pos" not in name and any(part in name for part in (".blocks.", ".layers.", ".h.", "projector."))


class Optimizer:
    """
    kind "muon" or "adamw". `lr` is AdamW's, `matrix_lr` Muon's. Every trainable parameter is in exactly one group.
    `step(scale)` multiplies both rates by the schedule's value.
    """
    def __init__(self, model, kind, lr, matrix_lr=0.02, weight_decay=0.0, betas=(0.9, 0.95), dtype=torch.float32, part_lrs=None):
        if kind not in ("muon", "adamw"):
            raise ValueError(f"optimizer {kind!r}: must be muon or adamw")
        self.params = {n: p for n, p in model.named_parameters() if p.requires_grad}
        matrices = [p for n, p in self.params.items() if kind == "muon" and is_block_matrix(n, p)]
        chosen = {id(p) for p in matrices}
        rest = [p for p in self.params.values() if id(p) not in chosen]
        fused = next(iter(self.params.values())).device.type in ("cpu", "cuda")
        self.parts = [torch.optim.AdamW(rest, lr=lr, betas=betas, eps=1e-10, weight_decay=weight_decay, fused=fused)]
        if matrices:
            self.parts.append(Muon(matrices, lr=matrix_lr, dtype=dtype))
        self.base_lrs = [part.param_groups[0]["lr"] for part in self.parts]

    def step(self, scale):
        for part, lr in zip(self.parts, self.base_lrs):
            part.param_groups[0]["lr"] = lr * scale
            part.step()

    def num_params(self):
        return sum(p.numel() for p in self.params.values())

    def zero_grad(self):
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    def clip_grad_norm(self, limit):
        """Global norm before clipping, a float tensor. limit <= 0 measures only."""
        params = list(self.params.values())
        return torch.nn.utils.clip_grad_norm_(params, limit if limit > 0 else float("inf"))

    def state_tensors(self):
        """{"<parameter name>.<state name>": tensor}."""
        return {f"{name}.{key}": value.detach().clone() for name, p in self.params.items() for part in self.parts
                for key, value in part.state.get(p, {}).items()}

    def load_state_tensors(self, tensors):
        """Inverse of `state_tensors`; a state of another model or optimizer raises."""
        left = dict(tensors)
        for part in self.parts:
            keys = ("momentum",) if isinstance(part, Muon) else ("step", "exp_avg", "exp_avg_sq")
            names = {id(p): n for n, p in self.params.items()}
            for p in part.param_groups[0]["params"]:
                for key in keys:
                    name = f"{names[id(p)]}.{key}"
                    if name not in left:
                        raise ValueError(f"optimizer state lacks {name}: it belongs to another model or optimizer")
                    value = left.pop(name)
                    on_cpu = key == "step" and not part.defaults["fused"]  # torch keeps AdamW's step there unless it is fused
                    part.state[p][key] = value if on_cpu else value.to(p.device)
        if left:
            raise ValueError(f"optimizer state has unknown tensors, e.g. {sorted(left)[:3]}: it belongs to another model or optimizer")


def schedule(kind, step, total=1, warmup=0, final=0.0):
    """
    Multiplier of the learning rates at `step` of `total`. `trapezoid`: constant, then linear over the last half;
    `cosine` (stage 1 as published); `step`: x0.316 at 80 % and again at 90 % (stage 2 as published names only "step";
    the points are DeepSeek-LLM's, arXiv 2401.02954 section 3.1). All warm up linearly over `warmup` steps.
    """
    if step < warmup:
        return (step + 1) / warmup
    done = step / max(1, total)
    if kind == "cosine":
        return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * done))
    if kind == "step":
        return 1.0 if done < 0.8 else 0.316 if done < 0.9 else 0.1
    if kind == "trapezoid":
        return 1.0 if done < 0.5 else final + (1 - final) * (1 - done) / 0.5
    raise ValueError(f"schedule {kind!r}: must be trapezoid, cosine or step")
