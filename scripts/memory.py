"""
Peak memory of a training step, by batch, sequence length and activation checkpointing, before a GPU is rented.

    python -m scripts.memory                                     # full size, stage 2 (SAM frozen), 1024 px
    python -m scripts.memory --stage=1 --mode=small --seqs=4096
    python -m scripts.memory --batches=1 --seqs=512 --mode=tiny --measure   # runs the step here and compares
    python -m scripts.memory --load=deepseek-ai/DeepSeek-OCR     # peak of this process while it loads the published encoder

The estimate is what the real forward pass saves for its backward pass, counted on the meta device, where tensors have sizes and no memory;
then parameters (fp32), gradients and optimizer state. Not in it: the CUDA context, the allocator's gaps and what a kernel borrows.
"""
import argparse
import resource
import sys

import torch
import torch.nn.functional as F

from nanochat.common import git_commit, json_line, print0, run_main
from nanochat.config import PRESETS
from nanochat.batch import Batch
from nanochat.clip import CLIPBlock
from nanochat.deepencoder import SAMBlock
from nanochat.gpt import Block
from nanochat.image_modes import get_mode, plan
from nanochat.layers import WRITTEN_OUT_ON
from nanochat.model import LOSS_CHUNK, DeepseekOCR
from nanochat.optim import Optimizer
from nanochat.pretrained import load_deepseek

GB = 1e9


class FusedAttention(torch.autograd.Function):
    """What a fused attention kernel keeps for its backward pass: q, k, v, the output and one fp32 number per row."""
    @staticmethod
    def forward(ctx, q, k, v):
        y = torch.empty(*q.shape[:-1], v.size(-1), dtype=q.dtype, device=q.device)
        ctx.save_for_backward(q, k, v, y, torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device))
        return y

    @staticmethod
    def backward(ctx, grad):
        raise NotImplementedError("only counted, never run")


def saved_bytes(module, run):
    """(bytes run() keeps for backward, the same with recomputation in every block). Parameters themselves are not counted."""
    kept, blocks, inputs = {}, [], []
    own = {p.untyped_storage()._cdata for p in module.parameters()}

    def pack(t):
        storage = t.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = (storage.nbytes(), t)  # the tensor is kept alive, so that no other gets its storage's address
        return t

    def total():
        return sum(n for n, _ in kept.values())

    def before(block, args):
        inputs.append(args[0].numel() * args[0].element_size() if torch.is_grad_enabled() else 0)
        blocks.append(total())

    def after(block, args, output):
        blocks[-1] = total() - blocks[-1]
    hooks = [h for m in module.modules() if isinstance(m, (SAMBlock, CLIPBlock, Block))
             for h in (m.register_forward_pre_hook(before), m.register_forward_hook(after))]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = run()
    for h in hooks:
        h.remove()
    del result
    everything = total()
    return everything, everything - sum(blocks) + sum(inputs) + max(blocks, default=0)


def build(args, device):
    cfg = PRESETS[args.preset]()
    cfg.gpt.vocab_size += 1  # <|image|>
    cfg.image_token_id = cfg.gpt.vocab_size - 1
    cfg.gpt.sequence_len = max(cfg.gpt.sequence_len, *args.seqs)
    with torch.device(device):
        model = DeepseekOCR(cfg)
    if args.stage == 2:
        model.encoder.freeze_sam()
    model.dtype = torch.bfloat16 if args.dtype == "bfloat16" else torch.float32
    return model.train()


def batch_of(args, model, rows, seq):
    """(views, plans, ids, targets) of `rows` rows of `seq` positions with args.images square pages each, all else supervised."""
    mode = get_mode(args.mode or model.cfg.modes[0], model.cfg.modes)
    p = plan(mode, 2 * mode.size, 2 * mode.size, model.cfg.token_stride)
    n, positions = rows * args.images, args.images * p.positions
    if positions >= seq:
        raise ValueError(f"{args.images} images take {positions} positions, the row has {seq}: raise --seqs or lower --images")
    views = {mode.size: torch.zeros(n, 3, mode.size, mode.size, dtype=torch.uint8)}
    if p.rows:
        views[mode.tile] = torch.zeros(n * p.rows * p.cols, 3, mode.tile, mode.tile, dtype=torch.uint8)
    ids = torch.zeros(rows, seq, dtype=torch.long)
    ids[:, :positions] = model.cfg.image_token_id
    targets = torch.where(ids == model.cfg.image_token_id, -1, 1)
    return Batch(ids, targets, views, [p] * n, [positions] * rows)


def estimate(args, model, rows, seq):
    """-> {part: (bytes, bytes with recomputation)} of one micro-batch, on the meta device."""
    batch, cfg, meta = batch_of(args, model, rows, seq), model.cfg, torch.device("meta")
    views = {side: v.to(meta) for side, v in batch.views.items()}
    plain, F.scaled_dot_product_attention = F.scaled_dot_product_attention, lambda q, k, v, **_: FusedAttention.apply(q, k, v)
    try:
        parts = {"encoder": saved_bytes(model, lambda: [model.project(v) for v in views.values()])}
        x = torch.empty(rows, seq, cfg.gpt.n_embd, device=meta, dtype=model.dtype, requires_grad=True)
        parts["decoder"] = saved_bytes(model, lambda: model.gpt(x))
    finally:
        F.scaled_dot_product_attention = plain
    n = int((batch.targets != -1).sum())
    chunk = max(1, LOSS_CHUNK // cfg.gpt.vocab_size)
    hidden = torch.empty(min(n, chunk), cfg.gpt.n_embd, device=meta, dtype=model.dtype, requires_grad=True)
    targets = torch.zeros(min(n, chunk), dtype=torch.long, device=meta)
    loss = saved_bytes(model, lambda: model.chunk_loss(hidden, targets))[0] + hidden.size(0) * cfg.gpt.vocab_size * 8  # gradients of the logits
    parts["loss"] = (loss + n * cfg.gpt.n_embd * hidden.element_size(),) * 2
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    parts["weights, gradients, AdamW"] = (4 * sum(p.numel() for p in model.parameters()) + 12 * trained,) * 2
    return parts


def peak_rss():
    """Bytes; what this process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def load_encoder(args):
    """Peak bytes of loading DeepSeek-OCR's encoder and projector into a model without decoder layers."""
    cfg = PRESETS[args.preset]()
    cfg.gpt.n_layer, cfg.gpt.vocab_size, cfg.standardize = 0, 1, "none"
    load_deepseek(DeepseekOCR(cfg).init_weights(0), args.load)
    return peak_rss()


def measure(args, rows, seq, recompute):
    """Peak bytes of two real steps on the device (the second has the optimizer's state from the start)."""
    cuda = torch.cuda.is_available()
    before = 0 if cuda else peak_rss()
    model = build(args, "cuda" if cuda else "cpu").init_weights(0)
    model.recompute(recompute)
    optimizer = Optimizer(model, "adamw", lr=1e-5)
    batch = batch_of(args, model, rows, seq).to(model.device)
    for _ in range(2):
        loss = model(batch)["text"][0] / batch.supervised()
        loss.backward()
        norm = optimizer.clip_grad_norm(1.0)
        optimizer.step(1.0)
        optimizer.zero_grad()
        print0(f"measured step: loss {loss.item():.4f}, gradient norm {norm.item():.4f}")
    return (torch.cuda.max_memory_allocated() if cuda else peak_rss()) - before


def main(argv=None):
    def ints(text):
        return [int(n) for n in text.split(",")]
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[1], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--preset", default="base", choices=sorted(PRESETS), help="sizes of the model (nanochat/config.py)")
    parser.add_argument("--stage", type=int, default=2, choices=[1, 2], help="1: everything trained; 2: SAM and compressor frozen")
    parser.add_argument("--mode", default="base", help="image mode; empty = the preset's first")
    parser.add_argument("--images", type=int, default=1, help="images in a row")
    parser.add_argument("--batches", type=ints, default="1,2,4,8", help="rows of a micro-batch, with commas")
    parser.add_argument("--seqs", type=ints, default="2048,4096,8192", help="positions of a row, with commas")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--measure", action="store_true", help="run the last batch and length here and compare")
    parser.add_argument("--recompute", action="store_true", help="with --measure: with activation checkpointing")
    parser.add_argument("--load", default="", help="hub name or folder of DeepSeek-OCR's weights: load its encoder, and nothing else")
    args = parser.parse_args(argv)

    if args.load:
        return json_line({"loaded": args.load, "peak_rss_gb": round(load_encoder(args) / GB, 2), "commit": git_commit()})
    if args.measure and not torch.cuda.is_available():
        WRITTEN_OUT_ON.add("meta")  # count attention as the CPU does it
    model, rows = build(args, "meta"), []
    print0(f"{args.preset}, stage {args.stage}, mode {args.mode or model.cfg.modes[0]}, {args.images} image(s) a row, {args.dtype}; peak GB, in brackets with --recompute")
    for seq in args.seqs:
        for batch in args.batches:
            parts = estimate(args, model, batch, seq)
            plain, recomputed = (sum(p[k] for p in parts.values()) / GB for k in (0, 1))
            rows.append({"seq": seq, "batch": batch, "gb": round(plain, 2), "gb_recompute": round(recomputed, 2)})
            print0(f"seq {seq:6d} batch {batch:3d} | {plain:7.1f} ({recomputed:6.1f}) | " +
                   " | ".join(f"{name} {a / GB:.1f}" + (f" ({b / GB:.1f})" if a != b else "") for name, (a, b) in parts.items()))
    result = {"memory": rows, "preset": args.preset, "stage": args.stage, "mode": args.mode, "images": args.images, "commit": git_commit()}
    if args.measure:
        peak = measure(args, args.batches[-1], args.seqs[-1], args.recompute) / GB
        expected = rows[-1]["gb_recompute" if args.recompute else "gb"]
        print0(f"measured peak {peak:.2f} GB, estimated {expected:.2f} GB")
        result.update(measured_gb=round(peak, 2), estimated_gb=expected, measured_over_estimated=round(peak / expected, 3))
    json_line(result)


if __name__ == "__main__":
    run_main(main)
