"""
Where a step's time goes, and how much of the chip it uses: stage 1, stage 2 and generation, eager and compiled.

    python -m scripts.bench                                                # nano, this machine
    python -m scripts.bench --against=5c218fe --what=stage1                # this tree and a commit's, step by step in turn: a ratio
    python -m scripts.bench --suite=checkpoints/bench.jsonl                # every figure a GPU is asked for, each in a process of its own
    python -m scripts.bench --preset=base --mode=base --what=stage2 --seq=8192 --pack=7 --batch=4 --recompute
    python -m scripts.bench --preset=base --what=generate,attention --batch=64 --new-tokens=1000

One JSON line for each of the runs asked for. MFU counts the FLOPs of nanochat/model.py's forward_flops (checked here against torch's
FlopCounterMode) against a matrix product measured in the same run; recomputation is not counted as work.
"""
import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from nanochat.common import choose_compile, choose_dtype, compute_init, git_commit, json_line, matmul_rate, print0, run_main, synchronize
from nanochat.config import PRESETS
from nanochat.dataloader import Sampler, ahead, loader
from nanochat.batch import Batch
from nanochat.engine import Engine
from nanochat.image_modes import get_mode, plan
from nanochat.model import LOSS_CHUNK, DeepseekOCR, forward_flops
from nanochat.optim import Optimizer
from nanochat.tokenizer import Tokenizer
from tasks.synthdoc import SynthDoc
from tasks.registry import text_pages

SUITE = (  # a GPU's figures, the cheapest first; batches for 80 GB
    "--preset=nano --batch=256",
    "--preset=small --batch=64 --seq=768 --what=stage1,stage2",
    "--preset=small --batch=64 --what=generate --new-tokens=1000",
    "--preset=base --mode=base --batch=10 --what=attention",
    "--preset=base --mode=base --batch=64 --what=generate --new-tokens=1000",
    "--preset=base --mode=base --batch=8 --seq=1536 --what=stage1 --optimizer=adamw",
    "--preset=base --mode=base --batch=4 --seq=8192 --what=stage2 --optimizer=adamw",
    "--preset=base --mode=base --batch=4 --seq=8192 --what=stage2 --optimizer=adamw --compile=yes --cudnn",
    "--preset=base --mode=base --batch=4 --seq=8192 --pack=6 --what=stage2 --optimizer=adamw")


def make_batch(model, mode, rows, seq, pack=1):
    """`rows` rows of `seq` positions: `pack` random square pages each, at equal distances, the text behind each supervised."""
    p, length = plan(mode, mode.size, mode.size, model.cfg.token_stride), seq // pack
    if p.positions >= length:
        raise ValueError(f"--seq={seq} --pack={pack}: mode {mode.name} alone takes {p.positions} positions, a sample has {length}")
    rng = torch.Generator().manual_seed(0)
    ids = torch.randint(model.cfg.image_token_id, (rows, seq), generator=rng)
    targets = ids.roll(-1, 1)
    for start in range(0, pack * length, length):
        ids[:, start:start + p.positions] = model.cfg.image_token_id
        targets[:, start:start + p.positions - 1], targets[:, start + length - 1] = -1, -1
    targets[:, pack * length:] = -1
    pixels = torch.randint(256, (rows * pack, 3, mode.size, mode.size), generator=rng, dtype=torch.uint8)
    packed = dict(positions=(torch.arange(seq) % length).repeat(rows, 1), lengths=[[length] * pack] * rows) if pack > 1 else {}
    batch = Batch(ids, targets, {mode.size: pixels}, [p] * (rows * pack), [p.positions * pack] * rows, **packed)
    return next(ahead([batch.pin_memory() if model.device.type == "cuda" else batch], model.device))


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


def build(args, cfg, device):
    gc.collect()  # a compiled model is a reference cycle, and its memory would count as this one's
    with device:
        model = DeepseekOCR(cfg).init_weights(0)
    model.dtype = choose_dtype(device, args.dtype)
    return model


def training(args, model, mode, stage, compiled, peak):
    """One training step: a record with speed, MFU, shares of time and peak memory."""
    device = model.device
    if stage == 2:
        model.encoder.freeze_sam()
    model.train()
    model.recompute(args.recompute)
    if compiled:
        model.compile_blocks()
    optimizer = Optimizer(model, args.optimizer, lr=1e-5, matrix_lr=1e-5, dtype=model.dtype)
    batch = make_batch(model, mode, args.batch, args.seq, args.pack)
    supervised, pixels, images = batch.supervised(), batch.views[mode.size], batch.images

    def forward_backward():
        (model(batch)["text"][0] / supervised).backward()

    def step():
        forward_backward()
        optimizer.clip_grad_norm(1.0)
        optimizer.step(1.0)
        optimizer.zero_grad()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    step()
    synchronize(device)
    first = time.perf_counter() - start  # with compiling
    dt = seconds(device, step, args.repeats)
    peak_gb = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else None
    parts = {}
    with torch.no_grad():
        parts["encoder forward"] = seconds(device, lambda: model.project(pixels), args.repeats)
        x = torch.randn(args.batch, args.seq, model.cfg.gpt.n_embd, device=device, dtype=model.dtype)
        parts["decoder forward"] = seconds(device, lambda: model.gpt(x, lengths=batch.lengths), args.repeats)
        hidden = x.flatten(0, 1)[:min(supervised, max(1, LOSS_CHUNK // model.cfg.gpt.vocab_size))]
        targets = torch.zeros(len(hidden), dtype=torch.long, device=device)
        parts["loss forward"] = supervised / len(hidden) * seconds(device, lambda: model.chunk_loss(hidden, targets), args.repeats)
    forward_backward()
    both = seconds(device, forward_backward, args.repeats)  # gradients add up, which takes no longer
    parts["backward"] = max(0.0, both - sum(parts.values()))
    parts["optimizer"] = max(0.0, dt - both)
    parts["rendering, meanwhile where there are workers"] = rendering(args, model, mode)
    if device.type == "cuda":
        on_host = pixels.cpu().pin_memory()
        parts["pixels to the device, meanwhile"] = seconds(device, lambda: on_host.to(device, non_blocking=True), args.repeats)
    f = forward_flops(model.cfg, {mode.size: images}, args.seq, args.batch, supervised, batch.lengths)
    flops = 3 * sum(f.values()) - (2 * f["sam"] if stage == 2 else 0)
    return {"compiled": compiled, "seq": args.seq, "pack": args.pack, "recompute": args.recompute, "optimizer": args.optimizer, "first_step_seconds": first,
            "seconds": dt,
            "images_per_sec": images / dt, "tokens_per_sec": batch.ids.numel() / dt, "mfu": flops / dt / peak, "peak_gb": peak_gb,
            "share": {k: round(v / dt, 3) for k, v in parts.items()}}


def rendering(args, model, mode):
    """Seconds in which --workers processes render the pages of a step, tokens and all: below a step's own, no step waits for data."""
    side = mode.size
    pages = text_pages("train", 1 << 40, side, [(400, 1300, 1)], 0) if side >= 512 else SynthDoc("train", 1 << 40, side, chars=(31, 41))
    sampler = Sampler(pages, Tokenizer(bytes([i]) for i in range(256)), mode, model.cfg.token_stride, 1 << 20)
    batches = loader(sampler, args.batch * args.pack, 0, args.repeats + 2)
    return seconds(torch.device("cpu"), lambda: next(batches), args.repeats) / max(1, args.workers)


class EndlessTokenizer:
    """Stands in for a tokenizer where only ids are timed: its end token is none that a model could choose."""
    def __init__(self, model):
        self.image_token_id = model.cfg.image_token_id
        self.vocab_size = model.cfg.gpt.vocab_size

    def encode_special(self, name):
        return -1 if name == "<|assistant_end|>" else self.image_token_id

    def get_vocab_size(self):
        return self.vocab_size


def generation(args, model, mode, graphs):
    """
    Greedy generation of --new-tokens for --batch pages, no row ends early. Decoding is bound by reading weights and cache from memory: its
    share of the bandwidth counts them once a token, and captures, the cache's growth and the unused room in it as lost time.
    """
    model.eval()
    for p in model.gpt.parameters():  # as engine.load_engine has it
        p.data = p.data.to(model.dtype)
    batch = make_batch(model, mode, args.batch, plan(mode, mode.size, mode.size, model.cfg.token_stride).positions + 8)
    lengths = [batch.ids.size(1)] * args.batch
    engine, device = Engine(model, EndlessTokenizer(model), mode), model.device
    engine.prompt_batch, engine.graphs = lambda _: (batch, lengths), graphs
    prefill = seconds(device, lambda: list(engine.decode(None, 1, 0.0, 0)), 3)
    whole = seconds(device, lambda: list(engine.decode(None, args.new_tokens, 0.0, 0)), 3)
    g, size = model.cfg.gpt, torch.finfo(model.dtype).bits // 8
    cache = 2 * g.n_layer * args.batch * g.n_kv_head * (g.n_embd // g.n_head) * (lengths[0] + args.new_tokens / 2) * size  # as it grows, on average
    weights = sum(p.numel() for p in model.gpt.transformer.h.parameters()) * size + g.vocab_size * g.n_embd * size
    a = torch.empty(1 << (28 if device.type == "cuda" else 24), dtype=torch.float32, device=device)
    bandwidth = 2 * a.numel() * 4 / seconds(device, lambda: a.add_(1), 5)  # read and written
    per_token = (whole - prefill) / (args.new_tokens - 1)
    return {"graphs": graphs, "new_tokens": args.new_tokens, "seconds": whole, "pages_per_sec": args.batch / whole,
            "tokens_per_sec": args.batch * args.new_tokens / whole, "prefill_share": prefill / whole,
            "bandwidth_share": (weights + cache) / per_token / bandwidth, "bandwidth_gb_per_sec": bandwidth / 1e9}


def sam_attention(args, cfg, mode, device, dtype):
    """
    One global SAM attention core, forward and backward, three ways to the same numbers: the bias folded into the head's dimensions with
    values padded to them (flash kernels), without that padding, and as a stored (HW, HW) mask. deepencoder.py uses the first.
    -> {way: {seconds, useful_tflops}}
    """
    s, H = cfg.sam, mode.size // cfg.sam.patch_size
    d = s.width // s.n_head
    extended, T = d + 2 * H + -(d + 2 * H) % 8, H * H
    q, k, v, bias = (torch.randn(args.batch, s.n_head, T, n, device=device, dtype=dtype, requires_grad=True) for n in (extended, extended, d, T))

    def anew():
        for t in (q, k, v, bias):
            t.grad = None

    def folded(padded):
        anew()
        y = F.scaled_dot_product_attention(q, k, F.pad(v, (0, extended - d)) if padded else v, scale=1.0)
        y[..., :d].sum().backward()

    def masked():
        anew()
        F.scaled_dot_product_attention(q[..., :d], k[..., :d], v, attn_mask=bias).sum().backward()
    ways = {"folded, values padded": lambda: folded(True), "folded": lambda: folded(False), "mask": masked}
    flops, found = 3 * 4 * args.batch * T * T * s.width, {name: seconds(device, call, args.repeats) for name, call in ways.items()}
    return {name: {"seconds": dt, "useful_tflops": flops / dt / 1e12} for name, dt in found.items()}


@torch.inference_mode()
def decode_attention(args, cfg, device, dtype):
    """One decoding step's attention to --new-tokens cached positions, by SDPA (layers.py on CUDA) and written out. -> {way: {seconds, gb_per_sec}}"""
    g, T = cfg.gpt, -(-args.new_tokens // 64) * 64
    q, k, v = (torch.randn(args.batch, heads, n, g.n_embd // g.n_head, device=device, dtype=dtype)
               for heads, n in ((g.n_head, 1), (g.n_kv_head, T), (g.n_kv_head, T)))
    mask = torch.zeros(args.batch, 1, 1, T, device=device, dtype=dtype)
    ways = {"sdpa": lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=g.n_head != g.n_kv_head)}
    if g.n_head == g.n_kv_head:
        ways["written out"] = lambda: ((q * q.size(-1) ** -0.5) @ k.mT + mask).softmax(-1) @ v
    found = {name: seconds(device, call, args.repeats) for name, call in ways.items()}
    return {name: {"seconds": dt, "gb_per_sec": 2 * k.numel() * k.element_size() / dt / 1e9} for name, dt in found.items()}


def run_suite(path):
    """Every row of SUITE in a process of its own, so that one out of memory leaves the others; rows already in `path` are not run again."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    done = [json.loads(line) for line in open(path)] if os.path.exists(path) else []
    for flags in SUITE:
        if any(r["flags"] == flags for r in done):
            continue
        p = subprocess.run([sys.executable, "-m", "scripts.bench", *flags.split()], capture_output=True, text=True)
        rows = [{"flags": flags, **json.loads(line)} for line in p.stdout.splitlines() if line.startswith("{")]
        if p.returncode:
            rows.append({"flags": flags, "failed": p.stderr.strip()[-2000:]})
        with open(path, "a") as f:
            f.writelines(json.dumps(row) + "\n" for row in rows)
        done += rows
        for row in rows:
            json_line(row)
    failed = [r["flags"] for r in done if "failed" in r]
    json_line({"bench": "suite", "rows": len(SUITE), "failed": failed, "path": path})
    if failed:
        raise ValueError(f"{len(failed)} of {len(SUITE)} rows failed, {path} says why; delete their lines to run them again: {'; '.join(failed)}")


def against(commit, flags, rounds):
    """This tree's bench and that of a commit, in turn: what differs between the rounds of a busy machine differs for both."""
    with tempfile.TemporaryDirectory() as folder:
        theirs = os.path.join(folder, "theirs")
        subprocess.run(["git", "worktree", "add", "--quiet", "--detach", theirs, commit], check=True)
        try:
            found = {}
            for tree in (theirs, os.getcwd()) * rounds:
                out = subprocess.run([sys.executable, "-m", "scripts.bench", *flags], cwd=tree, env={**os.environ, "PYTHONPATH": tree}, check=True,
                                     capture_output=True, text=True).stdout
                for r in (json.loads(line) for line in out.splitlines() if line.startswith("{")):
                    found.setdefault(r["bench"], {}).setdefault("before" if tree == theirs else "after", []).append(r)
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", theirs], check=True)
    for what, sides in found.items():
        best = {side: min(runs, key=lambda r: r["seconds"]) for side, runs in sides.items()}
        json_line({"bench": what, "against": best["before"]["commit"], "commit": best["after"]["commit"], "rounds": rounds,
                   "speedup": best["before"]["seconds"] / best["after"]["seconds"],
                   **{f"{side}_{key}": best[side].get(key) for side in best for key in ("seconds", "mfu", "threads", "dtype", "device")}})


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[1], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--suite", default="", help="FILE.jsonl: run every row of SUITE, above, that it does not hold yet, and nothing else")
    parser.add_argument("--against", default="", help="a commit to compare with: its own scripts.bench runs with the same flags")
    parser.add_argument("--rounds", type=int, default=3, help="with --against: how often each is run; the best counts")
    parser.add_argument("--device-type", default="", help="cuda, mps or cpu; empty = the best there is")
    parser.add_argument("--dtype", default="auto", help="compute dtype: auto, bfloat16, float32")
    parser.add_argument("--preset", default="nano", choices=sorted(PRESETS), help="sizes of the model (nanochat/config.py)")
    parser.add_argument("--mode", default="", help="image mode, untiled; empty = the preset's first")
    parser.add_argument("--what", default="stage1,stage2,generate", help="of stage1, stage2, generate, attention, with commas")
    parser.add_argument("--compile", default="", choices=["", "no", "yes", "both"], help="torch.compile for training; empty = both on cuda, no elsewhere")
    parser.add_argument("--vocab-size", type=int, default=0, help="0 = the preset's")
    parser.add_argument("--optimizer", default="muon", choices=["muon", "adamw"])
    parser.add_argument("--recompute", action="store_true", help="activation checkpointing")
    parser.add_argument("--batch", type=int, default=32, help="rows")
    parser.add_argument("--seq", type=int, default=72, help="decoder positions of a row in training, the page's included")
    parser.add_argument("--pack", type=int, default=1, help="samples in a row in training, each with a page")
    parser.add_argument("--new-tokens", type=int, default=200, help="generated per page")
    parser.add_argument("--cudnn", action="store_true", help="let torch choose cuDNN's attention, as training does not")
    parser.add_argument("--workers", type=int, default=-1, help="processes that render pages; -1 = all cores but two on cuda, none elsewhere")
    parser.add_argument("--repeats", type=int, default=7, help="timed steps; the median counts")
    args = parser.parse_args(argv)
    if args.suite:
        return run_suite(args.suite)
    if args.against:
        ours = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        ours.add_argument("--against")
        ours.add_argument("--rounds")
        return against(args.against, ours.parse_known_args(argv)[1], args.rounds)

    device = compute_init(args.device_type)
    torch.backends.cuda.enable_cudnn_sdp(args.cudnn)
    if args.workers < 0:
        args.workers = max(1, os.cpu_count() - 2) if device.type == "cuda" else 0
    cfg = PRESETS[args.preset]()
    cfg.gpt.vocab_size = args.vocab_size or cfg.gpt.vocab_size
    cfg.image_token_id = cfg.gpt.vocab_size - 1
    mode = get_mode(args.mode or cfg.modes[0], cfg.modes)
    cfg.gpt.sequence_len = max(cfg.gpt.sequence_len, args.seq, plan(mode, 1, 1, cfg.token_stride).positions + 8 + args.new_tokens)
    choice = args.compile or ("both" if choose_compile(device) else "no")
    if choice != "no":
        choose_compile(device, "yes")  # an error where there is no compiler
    peak = matmul_rate(device, choose_dtype(device, args.dtype))

    # counted against torch's own count, on one row
    model = build(args, cfg, device).eval()
    one = make_batch(model, mode, 1, args.seq)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.project(one.views[mode.size])
        model.gpt.logits(model.gpt(torch.zeros(1, args.seq, cfg.gpt.n_embd, device=device, dtype=model.dtype)))
    ours = sum(forward_flops(cfg, {mode.size: 1}, args.seq, 1).values())
    print0(f"{args.preset} {mode.name}: {model.num_params():,} parameters, {device.type}, {str(model.dtype)[6:]}, matmul {peak / 1e12:.3f} TFLOP/s; forward of one "
           f"row {ours / 1e9:.3f} GFLOP by our count, {counter.get_total_flops() / 1e9:.3f} by torch's (which counts the upper half of causal attention too)")
    common = {"preset": args.preset, "mode": mode.name, "batch": args.batch, "device": torch.cuda.get_device_name() if device.type == "cuda" else device.type,
              "threads": torch.get_num_threads(), "cudnn": args.cudnn, "workers": args.workers, "dtype": str(model.dtype)[6:], "matmul_tflops": peak / 1e12, "flops_over_torch": ours / counter.get_total_flops(),
              "torch": torch.__version__, "commit": git_commit()}
    dtype, model = model.dtype, None
    for what in args.what.split(","):
        if what in ("stage1", "stage2"):
            for compiled in {"no": [False], "yes": [True], "both": [False, True]}[choice]:
                json_line({"bench": what, **training(args, build(args, cfg, device), mode, int(what[-1]), compiled, peak), **common})
        elif what == "generate":
            for graphs in (False, True) if device.type == "cuda" else (False,):
                json_line({"bench": what, **generation(args, build(args, cfg, device), mode, graphs), **common})
        elif what == "attention":
            json_line({"bench": what, "sam": sam_attention(args, cfg, mode, device, dtype), "decoding": decode_attention(args, cfg, device, dtype), **common})
        else:
            raise ValueError(f"--what={what}: must be stage1, stage2, generate or attention")


if __name__ == "__main__":
    run_main(main)
