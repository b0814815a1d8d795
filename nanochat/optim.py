"""
Optimizers. `muon`: Muon for the matrices of all transformer blocks and of the projector, and for
the kernels of the encoder's convolutions; AdamW for everything else. `adamw`: AdamW throughout, as
published. Both are one object with one `step`, and a state that is a flat dict of named tensors
(for safetensors).
"""
import heapq
import math

import torch
import torch.distributed as dist

from nanochat.common import dist_info

# -----------------------------------------------------------------------------
# Muon (Keller Jordan, 2024)

@torch.no_grad()
def orthogonalize(G, dtype, steps=5):
    """
    A stack of matrices (N, a, b) -> roughly the nearest semi-orthogonal ones; their singular
    values end up in about [0.7, 1.2]. Newton-Schulz with Muon's quintic coefficients, in `dtype`,
    all N at once.
    """
    X = G.to(dtype)
    tall = X.size(1) > X.size(2)
    if tall:
        X = X.mT  # the products below are then of the smaller size
    # Newton-Schulz only converges from singular values of at most 1.
    X = X / (X.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        # X <- 3.4445 X - 4.7750 (X X^T) X + 2.0315 (X X^T)^2 X
        A = X @ X.mT
        B = torch.baddbmm(A, A, A, beta=-4.7750, alpha=2.0315)
        X = torch.baddbmm(X, B, X, beta=3.4445)
    if tall:
        X = X.mT
    return X.to(G.dtype)


def split_fused(matrix):
    """
    What is orthogonalized as one matrix, as views of it: a fused qkv (3C, C) is three of them, and
    a kernel (out, in, h, w) is one of (out, in * h * w).
    """
    if matrix.ndim == 4:
        return (matrix.view(matrix.size(0), -1),)
    is_qkv = matrix.size(0) == 3 * matrix.size(1)
    return matrix.chunk(3) if is_qkv else (matrix,)


def matrices_of(tensors):
    """Views of all that is orthogonalized as one matrix, in the order of `tensors`."""
    matrices = []
    for tensor in tensors:
        matrices.extend(split_fused(tensor))
    return matrices


def share_out(shapes, world):
    """
    Which rank orthogonalizes which of the matrices, at about equal cost: for each of `world` ranks
    {shape: [index in `shapes`]}. Every rank computes the same.
    """
    def flops(index):
        short, long = sorted(shapes[index])
        return 4 * short ** 2 * long + 2 * short ** 3  # the three products of one iteration

    shares = [{} for _ in range(world)]
    loads = [(0, rank) for rank in range(world)]  # a heap: the rank with the least to do is first
    # The most expensive come first; small ones then even out the loads. Those of equal cost follow
    # each other, so they are dealt round the ranks, and each rank still has stacks of them.
    for index in sorted(range(len(shapes)), key=flops, reverse=True):
        load, rank = heapq.heappop(loads)
        shares[rank].setdefault(shapes[index], []).append(index)
        heapq.heappush(loads, (load + flops(index), rank))
    return shares


def share_numel(share):
    """Elements of all matrices of a share."""
    return sum(len(indices) * shape.numel() for shape, indices in share.items())


def stacks_in(flat, share):
    """A share's stacks, one after the other in a flat tensor: yields (indices, view (N, a, b))."""
    start = 0
    for shape, indices in share.items():
        end = start + len(indices) * shape.numel()
        yield indices, flat[start:end].view(len(indices), *shape)
        start = end


class Muon(torch.optim.Optimizer):
    """
    Nesterov momentum, then orthogonalized. The step is scaled by sqrt(max(1, rows / columns)), so
    that matrices of any shape change their output by about as much.

    The ranks of a DDP run share the work: each orthogonalizes some of the matrices and sends the
    result to all. DDP gives every rank the same gradients, so all keep every momentum, and a
    checkpoint of one rank is complete.
    """
    def __init__(self, params, lr, momentum=0.95, dtype=torch.float32):
        super().__init__(params, dict(lr=lr, momentum=momentum))
        self.dtype = dtype

    @torch.no_grad()
    def step(self):
        rank, _, world = dist_info()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            grads = [p.grad.contiguous() for p in params]
            momenta = self.move_momenta(params, grads, group["momentum"])
            weights = matrices_of(params)
            grads = matrices_of(grads)
            momenta = matrices_of(momenta)

            # Row r holds what rank r orthogonalizes. A collective wants rows of one length.
            shares = share_out([weight.shape for weight in weights], world)
            longest = max(map(share_numel, shares))
            orthogonal = weights[0].new_empty(world, longest, dtype=self.dtype)
            for indices, stack in stacks_in(orthogonal[rank], shares[rank]):
                # Matrices of one shape go through Newton-Schulz together: a few large products
                # instead of many small ones.
                nesterov = torch._foreach_lerp(
                    [grads[i] for i in indices], [momenta[i] for i in indices], group["momentum"])
                stack.copy_(orthogonalize(torch.stack(nesterov), self.dtype))
            if world > 1:
                # Updates are sent, not weights: in bfloat16 they are half as many bytes.
                dist.all_gather_into_tensor(orthogonal.view(-1), orthogonal[rank])

            for row, share in zip(orthogonal, shares):
                for indices, stack in stacks_in(row, share):
                    rows, cols = stack.shape[1:]
                    size = group["lr"] * max(1, rows / cols) ** 0.5
                    updates = stack.to(weights[0].dtype).unbind()
                    torch._foreach_add_([weights[i] for i in indices], updates, alpha=-size)

    def move_momenta(self, params, grads, momentum):
        """Moves each momentum towards its gradient. -> the momenta, one per parameter."""
        for p in params:
            if "momentum" not in self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
        momenta = [self.state[p]["momentum"] for p in params]
        torch._foreach_lerp_(momenta, grads, 1 - momentum)
        return momenta


# -----------------------------------------------------------------------------

MATRICES_OF = (".blocks.", ".layers.", ".h.", "projector.")  # names of what Muon takes ...
KERNELS_OF = ("patch_embed.", "neck.", "net_2.", "net_3.")  # ... and of convolutions


def muon_takes(name, p):
    """
    Whether Muon takes a parameter: a matrix of a transformer block or of the projector, or a kernel
    of SAM's patches, neck and compressor.
    """
    # Position tables are no linear maps, whatever their shape.
    if "rel_pos" in name or "pos_embed" in name:
        return False
    if p.ndim == 4:
        # With AdamW letters take three times as many steps to learn (FINDINGS.md).
        return any(part in name for part in KERNELS_OF)
    return p.ndim == 2 and any(part in name for part in MATRICES_OF)


class Optimizer:
    """
    kind: "muon" or "adamw". lr is AdamW's rate, matrix_lr Muon's.

    part_lrs: {part: AdamW's rate} for parts of the model that learn at a rate of their own (names:
    DeepseekOCR.parts). Muon's rate of such a part follows in proportion: matrix_lr * part_lr / lr.

    heads: modules that learn beside the model, by AdamW at `lr`, and are no part of it. They are
    saved nowhere else, so its weights are in `state_tensors`.

    Every trainable parameter is in exactly one group of one of `optimizers`.
    """
    def __init__(self, model, kind, lr, matrix_lr=0.02, weight_decay=0.0, betas=(0.9, 0.95),
                 dtype=torch.float32, part_lrs=None, heads=None):
        if kind not in ("muon", "adamw"):
            raise ValueError(f"optimizer {kind!r}: must be muon or adamw")
        self.params = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not self.params:
            raise ValueError("nothing to train: every part of the model is frozen")
        rates = parameter_rates(model, lr, part_lrs or {})
        self.beside = {}  # parameters that are not the model's
        if heads is not None:
            for name, p in heads.named_parameters(prefix="heads"):
                self.beside[name] = p
                rates[name] = lr
        self.params.update(self.beside)

        # One group for each rate, and not for each part: Muon stacks equal shapes of a group.
        adamw_groups = {}  # {rate: [parameter]}
        muon_groups = {}
        for name, p in self.params.items():
            in_model = name not in self.beside
            takes_muon = kind == "muon" and in_model and muon_takes(name, p)
            groups = muon_groups if takes_muon else adamw_groups
            groups.setdefault(rates[name], []).append(p)

        device = next(iter(self.params.values())).device
        self.optimizers = []
        if adamw_groups:
            groups = [{"params": params, "lr": rate} for rate, params in adamw_groups.items()]
            fused = device.type in ("cpu", "cuda")  # one kernel for all parameters of a group
            self.optimizers.append(torch.optim.AdamW(
                groups,
                betas=betas,
                eps=1e-10,  # nanochat's
                weight_decay=weight_decay,
                fused=fused,
            ))
        if muon_groups:
            groups = []
            for rate, params in muon_groups.items():
                # A part that is to learn ten times slower does so in both optimizers.
                proportion = 1.0 if rate == lr else rate / lr
                groups.append({"params": params, "lr": matrix_lr * proportion})
            self.optimizers.append(Muon(groups, lr=matrix_lr, dtype=dtype))
        # The schedule multiplies these at every step.
        for group in self.groups():
            group["base_lr"] = group["lr"]

    def groups(self):
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def step(self, scale):
        """One update with all rates multiplied by `scale`, the schedule's value."""
        for group in self.groups():
            group["lr"] = group["base_lr"] * scale
        for optimizer in self.optimizers:
            optimizer.step()

    def num_params(self):
        """Parameters of the model that are trained."""
        in_model = [p for name, p in self.params.items() if name not in self.beside]
        return sum(p.numel() for p in in_model)

    def zero_grad(self):
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def clip_grad_norm(self, limit):
        """-> the global norm before clipping, a float tensor. limit <= 0 only measures."""
        # All parameters at once, over both optimizers. A tensor is returned: no GPU sync in here.
        params = list(self.params.values())
        return torch.nn.utils.clip_grad_norm_(params, limit if limit > 0 else float("inf"))

    def state_tensors(self):
        """
        {"<parameter name>.<state name>": tensor}, and {"<parameter name>": tensor} of the
        weights of the heads. References, which the next step changes: copies would need as much
        memory again on the device.
        """
        tensors = {name: p.detach() for name, p in self.beside.items()}
        for name, p in self.params.items():
            for optimizer in self.optimizers:
                # A parameter has no state before its first step, nor in the other optimizer.
                for key, value in optimizer.state.get(p, {}).items():
                    tensors[f"{name}.{key}"] = value.detach()
        return tensors

    def load_state_tensors(self, tensors):
        """Inverse of `state_tensors`. The state of another model or optimizer raises."""
        left = dict(tensors)
        for name, p in self.beside.items():
            if name not in left or left[name].shape != p.shape:
                raise ValueError(f"optimizer state lacks {name} of shape {tuple(p.shape)}: it "
                                 f"belongs to a run without this head, or with another one")
            with torch.no_grad():
                p.copy_(left.pop(name))
        names = {id(p): name for name, p in self.params.items()}
        for optimizer in self.optimizers:
            is_muon = isinstance(optimizer, Muon)
            keys = ("momentum",) if is_muon else ("step", "exp_avg", "exp_avg_sq")
            for group in optimizer.param_groups:
                for p in group["params"]:
                    for key in keys:
                        name = f"{names[id(p)]}.{key}"
                        if name not in left:
                            raise ValueError(f"optimizer state lacks {name}: it belongs to "
                                             f"another model or optimizer")
                        # torch keeps AdamW's step on the CPU unless it is fused.
                        stays_on_cpu = key == "step" and not group["fused"]
                        value = left.pop(name)
                        device = value.device if stays_on_cpu else p.device
                        # A copy: the file's own memory would keep the file, on a network drive
                        # even after it is deleted.
                        optimizer.state[p][key] = value.to(device, copy=True)
        if left:
            raise ValueError(f"optimizer state has unknown tensors, e.g. {sorted(left)[:3]}: it "
                             f"belongs to another model or optimizer")


def parameter_rates(model, lr, part_lrs):
    """{name of a parameter: its AdamW rate}"""
    rates = dict.fromkeys((name for name, _ in model.named_parameters()), lr)
    if not part_lrs:
        return rates
    if lr <= 0:
        raise ValueError(f"learning rate {lr} with rates for {', '.join(part_lrs)}: must be above "
                         f"0, since Muon's rates are in proportion to it; freeze the rest instead")
    parts = model.parts()
    for part, rate in part_lrs.items():
        if part not in parts:
            raise ValueError(f"learning rate {rate} for the part {part!r}: must be one of "
                             f"{', '.join(parts)}")
        for name, _ in parts[part]:
            rates[name] = rate
    return rates


# -----------------------------------------------------------------------------

def schedule(kind, done):
    """
    Multiplier of the learning rates when a share `done` of the run is over, 0 to 1.

    trapezoid: constant, then linear to zero over the last half
    cosine:    to zero (stage 1 as published)
    step:      x0.316 at 80 % and again at 90 %. The paper only says "step" for stage 2; the points
               are DeepSeek-LLM's (arXiv 2401.02954, section 3.1)
    """
    if kind == "cosine":
        return 0.5 * (1 + math.cos(math.pi * done))
    if kind == "step":
        if done < 0.8:
            return 1.0
        return 0.316 if done < 0.9 else 0.1
    if kind == "trapezoid":
        return 1.0 if done < 0.5 else (1 - done) / 0.5
    raise ValueError(f"schedule {kind!r}: must be trapezoid, cosine or step")
