"""
Where a step's time goes, and how much of the chip it uses: stage 1, stage 2 and generation, eager and compiled.

    python -m scripts.bench                                              # nano, this machine
    python -m scripts.bench --preset=base --mode=base --seq=8192 --batch=4 --recompute   # a GPU
    python -m scripts.bench --what=generate --batch=64

One JSON line for each of the runs asked for. MFU counts the FLOPs of nanochat/model.py's forward_flops (checked here against torch's
FlopCounterMode) against a matrix product measured in the same run; recomputation is not counted as work.
"""
import argparse
import shutil
import time

import torch
from torch.utils.flop_counter import FlopCounterMode

from nanochat.common import choose_dtype, compute_init, git_commit, json_line, matmul_rate, print0, run_main, synchronize
from nanochat.config import PRESETS
from nanochat.dataloader import Batch
from nanochat.engine import Engine
from nanochat.image_modes import get_mode, plan
from nanochat.model import LOSS_CHUNK, NanoDeepseekOCR, forward_flops
from nanochat.optim import Optimizer


def make_batch(model, mode, rows, seq):
    """`rows` rows of `seq` positions: one random square page each, every other position supervised."""
    p = plan(mode, mode.size, mode.size, model.cfg.token_stride)
    if p.positions >= seq:
        raise ValueError(f"--seq={seq}: mode {mode.name} alone takes {p.positions} positions")
    rng = torch.Generator().manual_seed(0)
    ids = torch.randint(model.cfg.image_token_id, (rows, seq), generator=rng)
    ids[:, :p.positions] = model.cfg.image_token_id
    targets = ids.roll(-1, 1)
    targets[:, :p.positions - 1], targets[:, -1] = -1, -1
    pixels = torch.randint(256, (rows, 3, mode.size, mode.size), generator=rng, dtype=torch.uint8)
    return Batch(ids, targets, {mode.size: pixels}, [p] * rows, [p.positions] * rows).to(model.device)


def seconds(device, call, repeats):
    """Median seconds of call(), after two to warm up."""
    times = []
    for i in range(repeats + 2):
        synchronize(device)
        start = time.perf_counter()
        call()
        synchronize(device)
        times += [time.perf_counter() - start] if i >= 2 else []
    return sorted(times)[len(times) // 2]


def training(args, model, mode, stage, compiled, peak):
    """One training step: a record with speed, MFU, shares of time and peak memory."""
    device = model.device
    model.encoder.sam_model.requires_grad_(stage == 1)
    model.encoder.standardize.frozen = stage == 2
    model.train()
    model.recompute(args.recompute)
    optimizer = Optimizer(model, args.optimizer, lr=1e-5, matrix_lr=1e-5, dtype=model.dtype)
    batch = make_batch(model, mode, args.batch, args.seq)
    supervised = batch.supervised()
    net = torch.compile(model) if compiled else model

    def forward():
        return net(batch) / supervised

    def forward_backward():
        forward().backward()

    def step():
        forward_backward()
        optimizer.clip_grad_norm(1.0)
        optimizer.step(1.0)
        optimizer.zero_grad()
    pixels = batch.views[mode.size]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    dt = seconds(device, step, args.repeats)
    peak_gb = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else None
    parts = {}
    with torch.no_grad():
        parts["encoder forward"] = seconds(device, lambda: model.project(pixels), args.repeats)
        x = torch.randn(args.batch, args.seq, model.cfg.gpt.n_embd, device=device, dtype=model.dtype)
        parts["decoder forward"] = seconds(device, lambda: model.gpt(x), args.repeats)
        hidden = x[batch.targets != -1][:max(1, LOSS_CHUNK // model.cfg.gpt.vocab_size)]
        scale = supervised / len(hidden)
        parts["loss forward"] = scale * seconds(device, lambda: model.chunk_loss(hidden, torch.zeros(len(hidden), dtype=torch.long, device=device)), args.repeats)
    forward_backward()
    both = seconds(device, forward_backward, args.repeats)  # gradients add up, which takes no longer
    parts["backward"] = max(0.0, both - sum(parts.values()))
    parts["optimizer"] = max(0.0, dt - both)
    optimizer.zero_grad()
    f = forward_flops(model.cfg, {mode.size: args.batch}, args.seq, args.batch, head_positions=supervised)
    flops = 3 * sum(f.values()) - (2 * f["sam"] if stage == 2 else 0)
    return {"seconds": dt, "images_per_sec": args.batch / dt, "tokens_per_sec": batch.ids.numel() / dt, "mfu": flops / dt / peak, "peak_gb": peak_gb,
            "share": {k: round(v / dt, 3) for k, v in parts.items()}}


class EndlessTokenizer:
    """Stands in for a tokenizer where only ids are timed: its end token is none that a model could choose."""
    def __init__(self, model):
        self.image_token_id = model.cfg.image_token_id

    def encode_special(self, name):
        return -1 if name == "<|assistant_end|>" else self.image_token_id


def generation(args, model, mode):
    """Greedy generation of --new-tokens for --batch pages, no row ends early. Decoding is bound by reading weights and cache from memory."""
    model.eval()
    batch = make_batch(model, mode, args.batch, plan(mode, mode.size, mode.size, model.cfg.token_stride).positions + 8)
    lengths = [batch.ids.size(1)] * args.batch
    engine, device = Engine(model, EndlessTokenizer(model), mode), model.device
    engine.prompt_batch = lambda _: (batch, lengths)
    prefill = seconds(device, lambda: list(engine.decode(None, 1, 0.0, 0)), 3)
    whole = seconds(device, lambda: list(engine.decode(None, args.new_tokens, 0.0, 0)), 3)
    g, size = model.cfg.gpt, torch.finfo(model.dtype).bits // 8
    cache = 2 * g.n_layer * args.batch * g.n_kv_head * (g.n_embd // g.n_head) * (lengths[0] + args.new_tokens) * size
    weights = sum(p.numel() for p in model.gpt.parameters()) * size
    a = torch.empty(1 << (28 if device.type == "cuda" else 24), dtype=torch.float32, device=device)
    bandwidth = 2 * a.numel() * 4 / seconds(device, lambda: a.add_(1), 5)  # read and written
    per_token = (whole - prefill) / (args.new_tokens - 1)
    return {"seconds": whole, "pages_per_sec": args.batch / whole, "tokens_per_sec": args.batch * args.new_tokens / whole, "prefill_share": prefill / whole,
            "bandwidth_share": (weights + cache) / per_token / bandwidth, "bandwidth_gb_per_sec": bandwidth / 1e9}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[1], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--device-type", default="", help="cuda, mps or cpu; empty = the best there is")
    parser.add_argument("--dtype", default="auto", help="compute dtype: auto, bfloat16, float32")
    parser.add_argument("--preset", default="nano", choices=sorted(PRESETS), help="sizes of the model (nanochat/config.py)")
    parser.add_argument("--mode", default="", help="image mode, untiled; empty = the preset's first")
    parser.add_argument("--what", default="stage1,stage2,generate", help="with commas")
    parser.add_argument("--compile", default="", choices=["", "no", "yes", "both"], help="torch.compile for training; empty = both on cuda, no elsewhere")
    parser.add_argument("--vocab-size", type=int, default=0, help="0 = the preset's")
    parser.add_argument("--optimizer", default="muon", choices=["muon", "adamw"])
    parser.add_argument("--recompute", action="store_true", help="activation checkpointing")
    parser.add_argument("--batch", type=int, default=32, help="pages")
    parser.add_argument("--seq", type=int, default=72, help="decoder positions of a row in training, the page's included")
    parser.add_argument("--new-tokens", type=int, default=200, help="generated per page")
    parser.add_argument("--repeats", type=int, default=7, help="timed steps; the median counts")
    args = parser.parse_args(argv)

    device = compute_init(args.device_type)
    cfg = PRESETS[args.preset]()
    cfg.gpt.vocab_size = args.vocab_size or cfg.gpt.vocab_size
    cfg.image_token_id = cfg.gpt.vocab_size - 1
    mode = get_mode(args.mode or cfg.modes[0], cfg.modes)
    cfg.gpt.sequence_len = max(cfg.gpt.sequence_len, args.seq, plan(mode, 1, 1, cfg.token_stride).positions + 8 + args.new_tokens)
    model = NanoDeepseekOCR(cfg).init_weights(0).to(device)
    model.dtype = choose_dtype(device, args.dtype)
    peak = matmul_rate(device, model.dtype)

    # counted against torch's own count, on one row
    small = make_batch(model.eval(), mode, 1, args.seq)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.project(small.views[mode.size])
        model.gpt.logits(model.gpt(torch.zeros(1, args.seq, cfg.gpt.n_embd, device=device, dtype=model.dtype)))
    ours = sum(forward_flops(cfg, {mode.size: 1}, args.seq, 1).values())
    print0(f"{args.preset} {mode.name}: {model.num_params():,} parameters, {device.type}, {str(model.dtype)[6:]}, matmul {peak / 1e12:.3f} TFLOP/s; forward of one "
           f"row {ours / 1e9:.3f} GFLOP by our count, {counter.get_total_flops() / 1e9:.3f} by torch's (which counts the upper half of causal attention too)")
    common = {"preset": args.preset, "mode": mode.name, "batch": args.batch, "device": torch.cuda.get_device_name() if device.type == "cuda" else device.type,
              "threads": torch.get_num_threads(), "dtype": str(model.dtype)[6:], "matmul_tflops": peak / 1e12, "flops_over_torch": ours / counter.get_total_flops(),
              "torch": torch.__version__, "commit": git_commit()}
    choice = args.compile or ("both" if device.type == "cuda" else "no")
    if choice != "no" and not (shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")):
        raise ValueError("--compile needs a C++ compiler (g++), which is not here: --compile=no")
    for what in args.what.split(","):
        if what in ("stage1", "stage2"):
            for compiled in {"no": [False], "yes": [True], "both": [False, True]}[choice]:
                json_line({"bench": what, "compiled": compiled, "seq": args.seq, **training(args, model, mode, int(what[-1]), compiled, peak), **common})
        elif what == "generate":
            json_line({"bench": what, "new_tokens": args.new_tokens, **generation(args, model, mode), **common})
        else:
            raise ValueError(f"--what={what}: must be stage1, stage2 or generate")


if __name__ == "__main__":
    run_main(main)
