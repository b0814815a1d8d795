"""Instruments: time of a call on any device, memory bandwidth, peak memory without a device."""
import statistics
import time
import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nanochat.common import synchronize


def median_seconds(device, call, repeats):
    """Median seconds of call(), after two calls to warm up."""
    times = []
    for _ in range(2 + repeats):
        synchronize(device)  # what was launched before is not part of this call
        start = time.perf_counter()
        call()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


def median_and_range(values):
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def memory_bandwidth(device):
    """Bytes/s that the device reads and writes while it adds one to a large tensor in place."""
    elements = 1 << 28 if device.type == "cuda" else 1 << 24  # 1 GB and 64 MB: past the caches
    tensor = torch.zeros(elements, dtype=torch.float32, device=device)
    moved = 2 * tensor.nbytes  # every element is read and written
    return moved / median_seconds(device, lambda: tensor.add_(1), repeats=5)


# -----------------------------------------------------------------------------
# Memory, predicted on the meta device: tensors there have sizes and types, but no memory

class PeakMemory(TorchDispatchMode):
    """
    While active, counts the bytes of all meta tensors that are alive: `live` now, `peak` at most.
    It sees every operation, those of the backward pass and of recomputation too.
    """
    def __init__(self):
        super().__init__()
        self.live = 0
        self.peak = 0
        self.known = set()  # ids of the storages that are counted in `live`

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.is_meta:
                self.add(leaf.untyped_storage())
        return result

    def add(self, storage):
        # Python's object of a storage stays the same as long as the storage lives.
        key = id(storage)
        if key in self.known:  # a view of a tensor, or the result of an operation in place
            return
        size = storage.nbytes()
        self.known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        # Only a weak reference: the storage goes away with its last tensor, and says so.
        weakref.finalize(storage, self.remove, key, size)

    def remove(self, key, size):
        self.known.remove(key)
        self.live -= size


def flash_attention(q, k, v, attn_mask=None, is_causal=False, scale=None, enable_gqa=False):
    """
    In place of F.scaled_dot_product_attention on the meta device, which would store the (T, T)
    scores there: keeps for the backward pass what fused kernels do (q, k, v, output, log-sum-exp).
    """
    # The operator behind SDPA on a CPU. SDPA itself picks another on the meta device.
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    output, _logsumexp = flash(q, k, v, 0.0, is_causal, attn_mask=attn_mask, scale=scale)
    return output
