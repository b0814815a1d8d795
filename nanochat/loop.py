"""
The training loop both stages share: one step is accumulate, reduce, check, update, log; between steps evaluate and save.
A stage's script builds model, optimizer and data; what happens per step is the same and stands here once.
"""
import argparse
import json
import math
import os
import time
from collections import Counter
from contextlib import nullcontext
from itertools import islice

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from nanochat import checkpoint as ckpt
from nanochat.common import (all_reduce, banner, barrier, choose_compile, choose_dtype, dist_info, gather, git_commit, init_wandb, matmul_rate, print0, read_json, write_json)
from nanochat.dataloader import Sampler, ahead, loader
from nanochat.batch import collate
from nanochat.engine import Engine
from nanochat.gauges import cosines, read_pages, reestimate_statistics, validate
from nanochat.image_modes import get_mode
from nanochat.model import forward_flops
from nanochat.optim import Optimizer, schedule

VAL_PAGES, GAUGE_PAGES, STATISTICS_PAGES = 64, 16, 256
BLIND_GAP = 0.05  # nats per character: below this the page is as good as ignored


def training_arguments(description, **defaults):
    """argparse parser with the flags of both stages; the stage's own come on top."""
    p = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    def flag(name, kind=str, default=None, **kw):
        p.add_argument(name, type=kind, default=defaults.get(name[2:].replace("-", "_"), default), **kw)
    # Logging
    flag("--run", default="dummy", help="W&B run name; dummy = no W&B")
    # Runtime
    flag("--device-type", default="", help="cuda, mps or cpu; empty = the best there is")
    flag("--dtype", default="auto", help="compute dtype: auto (bfloat16 where the hardware has it), bfloat16, float32")
    flag("--compile", default="auto", choices=["auto", "yes", "no"], help="torch.compile; auto: on CUDA where a compiler is found")
    flag("--seed", int, 0, help="seed of weights and data")
    flag("--workers", int, 0, help="data loader processes per rank")
    # Data
    flag("--tokenizer", default="checkpoints/tokenizer", help="folder of scripts.tok_train")
    flag("--mode", default="", help="image mode, or several with commas, which samples take in turn (validated in the first); empty = the preset's first")
    flag("--data", default="synthdoc", help="training data, NAME[:ARG][=SHARE] with commas, e.g. folder:DIR=3,smoltalk=1; names in tasks/registry.py; "
         "validated on held-out samples of the first")
    p.add_argument("--stream", action="store_true", help="read the hub's sets as streams, which need no disk")
    flag("--val-share", float, 0.1, help="share of a folder's pages that is held out")
    flag("--chars", help="characters a page, LO-HI or LO-HIxWEIGHT, several with commas")
    flag("--faces", default="sans,sans-bold,sans-oblique,serif,serif-bold,mono", help="faces of the print (tasks/synthdoc.py)")
    flag("--min-px", int, 10, help="smallest print in px, where the text fits")
    flag("--random-share", float, 0.2, help="share of words replaced by random strings, so that reading beats guessing")
    flag("--ramp", int, 0, help="curriculum: pages grow from large print to the full range over this many samples")
    flag("--max-seq-len", int, 256, help="decoder positions a sample may take, image included")
    flag("--max-images", int, 16, help="images a sample, and a packed row, may have")
    flag("--pack", int, 0, help="positions of a row that holds several samples; 0 = one sample a row")
    flag("--too-long", default="raise", choices=["raise", "clip", "drop"], help="samples over --max-seq-len, --max-images; clip cuts text")
    flag("--bad-data", default="raise", choices=["raise", "skip"], help="samples that cannot be used: stop, or count them and go on")
    # Training horizon
    flag("--num-iterations", int, help="optimizer steps")
    flag("--max-minutes", float, -1, help="end the stage after so many minutes of steps, the learning rate with it; -1 = no limit")
    flag("--device-batch-size", int, 32, help="samples per micro-batch and rank; less of it needs less memory")
    flag("--total-batch-size", int, -1, help="samples per optimizer step over all ranks; -1 = one micro-batch per rank")
    # Optimizer
    flag("--optimizer", default="muon", choices=["muon", "adamw"], help="muon: Muon for block matrices, AdamW for the rest")
    flag("--lr", float, 3e-3, help="AdamW's learning rate")
    flag("--matrix-lr", float, 0.02, help="Muon's learning rate")
    flag("--weight-decay", float, 0.0, help="AdamW's weight decay")
    flag("--schedule", default="trapezoid", choices=["trapezoid", "cosine", "step"], help="learning rate over the run")
    flag("--warmup-steps", int, 20, help="steps of linear warm-up")
    flag("--grad-clip", float, 1.0, help="limit of the global gradient norm; -1 = off")
    # Evaluation
    flag("--eval-every", int, 100, help="steps between evaluations; -1 = only at the end")
    # Output
    flag("--model-tag", help="run folder under --checkpoints")
    flag("--checkpoints", default="checkpoints", help="where run folders are written")
    flag("--save-every", int, 100, help="steps between checkpoints; -1 = only at the end")
    p.add_argument("--recompute", action="store_true", help="activation checkpointing: a third more compute for a fraction of the memory")
    p.add_argument("--resume", action="store_true", help="go on from the run folder's last checkpoint")
    return p


NOT_PART_OF_THE_RUN = {"resume", "run", "workers", "checkpoints", "device_type"}  # may change on --resume


def open_run(args):
    """Creates the run folder, or checks that --resume may go on in it. -> (folder, step to resume from or None)."""
    run_dir = os.path.join(args.checkpoints, args.model_tag)
    steps = ckpt.steps_of(run_dir)
    config = {k: v for k, v in vars(args).items() if k not in NOT_PART_OF_THE_RUN}
    config_path = os.path.join(run_dir, "run.json")
    if (steps or os.path.exists(config_path)) and not args.resume:
        raise FileExistsError(f"{run_dir} holds a run: --resume goes on with it, another --model-tag keeps it, or delete it")
    if os.path.exists(config_path):
        old = read_json(config_path)
        changed = [f"--{k.replace('_', '-')} was {old.get(k)!r}, now {config.get(k)!r}" for k in sorted({*old, *config})
                   if old.get(k) != config.get(k)]
        if changed:
            raise ValueError(f"cannot resume {run_dir} under a changed config: {'; '.join(changed)}")
    barrier()  # no rank writes before every rank has looked
    if dist_info()[0] == 0:
        os.makedirs(run_dir, exist_ok=True)
        write_json(config_path + ".tmp", config)
        os.replace(config_path + ".tmp", config_path)
    barrier()
    if args.resume and not steps:
        print0(f"{run_dir} has no whole checkpoint: starting from the beginning")
    return run_dir, steps[-1] if steps else None


class Records:
    """The run's numbers: a JSON-lines file (the truth) and W&B. A resumed run drops what the lost steps had written."""
    def __init__(self, run_dir, wandb_run, resume_step):
        self.path, self.wandb, self.master = os.path.join(run_dir, "metrics.jsonl"), wandb_run, dist_info()[0] == 0
        if not self.master:
            return
        kept = []
        if os.path.exists(self.path) and resume_step is not None:
            with open(self.path) as f:
                lines = [json.loads(line) for line in f if line.endswith("\n")]  # a killed run may leave half a line
            kept = [r for r in lines if r["step"] < resume_step or (r["step"] == resume_step and "train/loss" not in r)]
        with open(self.path, "w") as f:
            f.writelines(json.dumps(r) + "\n" for r in kept)

    def log(self, record):
        if self.master:
            with open(self.path, "a") as f:
                f.write(json.dumps(record) + "\n")
            self.wandb.log(record)

    def read(self):
        with open(self.path) as f:
            return [json.loads(line) for line in f]


def draw_curves(records, path):
    """Loss, gap, cosines and 1-NED over steps, as a PNG."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    panels = [("loss, nats per token", ["train/loss", "val/loss"]), ("gap, nats per character", ["vision/gap"]),
              ("cosine between pages", [f"vision/cosine_{n}" for n in ("sam", "compressor", "clip", "projector")]),
              ("1-NED on fixed pages", ["val/one_minus_ned"])]
    figure, axes = plt.subplots(1, len(panels), figsize=(4.5 * len(panels), 3.5))
    for axis, (title, names) in zip(axes, panels):
        for name in names:
            points = [(r["step"], r[name]) for r in records if name in r]
            axis.plot(*zip(*points), label=name) if points else None
        axis.set_title(title)
        axis.set_xlabel("step")
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


class Evaluator:
    """Fixed, seeded validation pages, in the first of the modes, and everything measured on them; statistics for all."""
    def __init__(self, tokenizer, modes, stride, args, val_task, statistics_task):
        def batches(task, n, mode):
            """(batches of the first n usable samples, their indices)."""
            sampler = Sampler(task, tokenizer, mode, stride, args.max_seq_len, args.bad_data, args.too_long, args.max_images)
            samples = ((i, sampler[i]) for i in range(len(task)))
            found = list(islice((pair for pair in samples if pair[1].ids), n))
            if len(found) < 2:
                raise ValueError(f"validation needs at least 2 pages, there is {len(found)}: give more, or raise --val-share")
            if left_out := found[-1][0] + 1 - len(found):
                print0(f"validation leaves out {left_out} samples that cannot be used (--bad-data, --too-long)")
            size = math.ceil(len(found) / math.ceil(len(found) / 32))  # no batch of one page: the gap needs another
            return [collate([s for _, s in found[k:k + size]]) for k in range(0, len(found), size)], [i for i, _ in found]
        mode = modes[0]
        self.val, usable = batches(val_task, VAL_PAGES, mode)
        self.statistics = [batches(statistics_task, STATISTICS_PAGES, mode)[0] for mode in modes]
        self.pages = [val_task[i] for i in usable[:GAUGE_PAGES]]
        self.gauge_pixels = self.val[0].views[mode.size][:GAUGE_PAGES]
        self.max_new_tokens = max(len(tokenizer.encode(p["messages"][-1]["content"])) for p in self.pages) + 16

    def __call__(self, model, tokenizer, mode):
        """-> (record, [(conversation, prediction, 1-NED)]). Leaves the model in training mode."""
        model.eval()
        for batches in self.statistics:
            reestimate_statistics(model, batches)
        record = validate(model, self.val)
        record.update({f"vision/cosine_{k}": v for k, v in cosines(model, self.gauge_pixels).items()})
        rows = read_pages(Engine(model, tokenizer, mode), self.pages, self.max_new_tokens)
        record["val/one_minus_ned"] = sum(score for *_, score in rows) / len(rows)
        model.train()
        return record, rows


def log_pages(wandb_run, rows, step):
    """Pages with truth and prediction: two on the console, all as a table in W&B."""
    for c, prediction, score in rows[:2]:
        print0(f"  {score:.2f}  truth {c['messages'][-1]['content']!r}\n        reads {prediction!r}")
    if hasattr(wandb_run, "config"):
        import wandb
        table = wandb.Table(columns=["page", "truth", "prediction", "1-NED"])
        for c, prediction, score in rows:
            table.add_data(wandb.Image(c["images"][0]), c["messages"][-1]["content"], prediction, score)
        wandb_run.log({"val/pages": table, "step": step})


def samples_per_step(args):
    """Samples per optimizer step over all ranks."""
    per_pass = args.device_batch_size * dist_info()[2]
    total = per_pass if args.total_batch_size == -1 else args.total_batch_size
    if min(total, args.device_batch_size, args.num_iterations) < 1:
        raise ValueError(f"--device-batch-size={args.device_batch_size}, --total-batch-size={args.total_batch_size} and "
                         f"--num-iterations={args.num_iterations} must be at least 1")
    if total % per_pass:
        raise ValueError(f"--total-batch-size={total} is not a multiple of one pass: {args.device_batch_size} x {dist_info()[2]} ranks = {per_pass}")
    return total


def train(args, stage, model, tokenizer, task, val_task, statistics_task, device):
    """
    Runs one stage to its end and writes its checkpoints. model: initialised, on `device`, frozen where it should be.
    task: at least num_iterations * total batch size samples. -> summary (also the last line printed, as JSON).
    """
    rank, _, world = dist_info()
    modes = [get_mode(name, model.cfg.modes) for name in (args.mode or model.cfg.modes[0]).split(",")]
    mode = modes[0]
    per_pass, total_batch = args.device_batch_size * world, samples_per_step(args)
    accumulate = total_batch // per_pass
    model.dtype = choose_dtype(device, args.dtype)
    optimizer = Optimizer(model, args.optimizer, args.lr, args.matrix_lr, args.weight_decay, dtype=model.dtype)
    if args.max_seq_len > model.cfg.gpt.sequence_len:
        raise ValueError(f"--max-seq-len={args.max_seq_len}: the decoder has {model.cfg.gpt.sequence_len} positions")
    compiled = choose_compile(device, args.compile)
    longest = args.pack or args.max_seq_len  # compiled kernels are made for one shape each: rows then come in four lengths
    sampler = Sampler(task, tokenizer, modes, model.cfg.token_stride, args.max_seq_len, args.bad_data, args.too_long, args.max_images,
                      args.pack, multiple=1 if not compiled else longest if longest % 4 else longest // 4)

    # start order: resume, else what the script put into the model
    run_dir, start = open_run(args)
    state = {"seconds": 0.0, "flops": 0.0, "waited": 0.0, "images": 0, "best": None, "best_step": None, "best_saved": None, "best_saved_step": None,
             "last_eval": None, "data": {}, "streams": None}  # samples counted so far; of each rank, {worker: state}
    if start is not None:
        meta = ckpt.load_training_state(run_dir, start, model, optimizer)
        state = meta["loop_state"]
        print0(f"resuming {run_dir} at step {start}")
    wandb_run = init_wandb(args.run, vars(args))
    records = Records(run_dir, wandb_run, start)
    meta = {"stage": stage, "user_config": vars(args), "mode": mode.name, "world_size": world, "commit": git_commit(),
            "tokenizer": tokenizer.fingerprint(), "torch": torch.__version__}

    peak = matmul_rate(device, model.dtype)
    print0(f"{stage}: {model.num_params():,} parameters, {sum(p.numel() for p in optimizer.params.values()):,} trained; {device.type} x {world}, "
           f"{str(model.dtype)[6:]}, {'compiled' if compiled else 'eager'}, matmul {peak / 1e9:,.0f} GFLOP/s; {total_batch} samples a step = {accumulate} x {per_pass}")
    if compiled:
        model.compile_blocks()
    net = DistributedDataParallel(model, broadcast_buffers=False) if world > 1 else model
    evaluator = Evaluator(tokenizer, modes, model.cfg.token_stride, args, val_task, statistics_task)
    step = start or 0
    streams = dict(state["streams"][rank]) if state["streams"] else {}
    batches = ahead(loader(sampler, args.device_batch_size, step * accumulate, args.num_iterations * accumulate, rank, world,
                           args.workers, pin_memory=device.type == "cuda", states=streams), device)
    sam_trains = model.encoder.sam_model.pos_embed.requires_grad
    model.recompute(args.recompute)
    model.train()

    limit = 60 * args.max_minutes if args.max_minutes > 0 else math.inf
    while True:
        progress = max(step / args.num_iterations, state["seconds"] / limit)
        last = progress >= 1
        saving = step != start and (last or (step > 0 and args.save_every > 0 and step % args.save_every == 0))
        # ------------------------------------------------------------- evaluate
        if step != start and (last or saving or (args.eval_every > 0 and step % args.eval_every == 0)):
            with torch.compiler.set_stance("force_eager") if compiled else nullcontext():
                record, rows = evaluator(model, tokenizer, mode)
            if not math.isfinite(record["val/loss"]):
                raise ValueError(f"step {step}: validation loss {record['val/loss']}: the last update spoilt the weights, nothing is saved; "
                                 f"lower --lr / --matrix-lr")
            if state["best"] is None or record["val/loss"] < state["best"]:
                state["best"], state["best_step"] = record["val/loss"], step
            if saving and (state["best_saved"] is None or record["val/loss"] < state["best_saved"]):
                state["best_saved"], state["best_saved_step"] = record["val/loss"], step
            state["last_eval"] = record
            records.log({"step": step, **record, "train/total_flops": state["flops"], "train/total_seconds": state["seconds"]})
            print0(f"step {step:05d} | val loss {record['val/loss']:.4f} | 1-NED {record['val/one_minus_ned']:.3f} | gap {record['vision/gap']:.3f} "
                   f"nats/char | cosine " + " ".join(f"{k} {record[f'vision/cosine_{k}']:.3f}" for k in ("sam", "compressor", "clip", "projector")))
            log_pages(wandb_run, rows, step)
            if progress >= 0.3 and record["vision/gap"] < BLIND_GAP:
                banner(f"step {step}: vision/gap is {record['vision/gap']:.4f} nats per character. The model ignores the page: swapping all\n"
                       f"images changes nothing. Look at vision/cosine_*: near 1 = the encoder has collapsed (README, 'when it does not read').")
        # ----------------------------------------------------------------- save
        if saving:
            model.encoder.standardize.average_over_ranks()
            state["streams"] = gather(streams) if streams else None
            ckpt.save_checkpoint(run_dir, step, model, tokenizer, optimizer, dict(meta, loop_state=state))
            if rank == 0:
                if stage == "stage 1":  # the encoder alone as well, for stage 2
                    ckpt.save_encoder(run_dir, step, model, meta)
                keep = {*ckpt.steps_of(run_dir)[-2:], state["best_saved_step"]}
                ckpt.prune(run_dir, keep)
                ckpt.prune(run_dir, keep, "deepencoder")
        if last:
            break
        # ------------------------------------------------------------- one step
        # The host waits for the device once, for the gradient norm; the update then runs while the next batch is prepared and launched.
        t0 = time.perf_counter()
        micro = [next(batches) for _ in range(accumulate)]
        wait = time.perf_counter() - t0
        streams.update({str(b.state["worker"]): b.state for b in micro if b.state})
        supervised = all_reduce(sum(b.supervised() for b in micro), device)
        if not supervised:
            raise ValueError(f"step {step}: no supervised token in the whole batch")
        flops, total = 0.0, 0.0
        for i, batch in enumerate(micro):
            if world > 1:
                net.require_backward_grad_sync = i == accumulate - 1
            loss = net(batch)["text"][0] / supervised
            (loss * world).backward()  # DDP averages over ranks; the loss is a mean over the step's supervised tokens
            total += loss.detach().double() if device.type != "mps" else loss.detach()
            f = forward_flops(model.cfg, {s: len(v) for s, v in batch.views.items()}, batch.ids.size(1), batch.ids.size(0),
                              batch.supervised(), batch.lengths)
            flops += 3 * sum(f.values()) - (0 if sam_trains else 2 * f["sam"])  # backward costs two forwards, unless frozen
        gnorm = optimizer.clip_grad_norm(args.grad_clip)
        total, gnorm = torch.stack([total, gnorm.to(total)]).tolist()
        train_loss = all_reduce(total, device)
        if not math.isfinite(train_loss) or not math.isfinite(gnorm):
            raise ValueError(f"step {step}: loss {train_loss}, gradient norm {gnorm}: not finite, stopped before the update; "
                             f"lower --lr / --matrix-lr or look at the batch of this step")
        at = step if step < args.warmup_steps or limit == math.inf else progress * args.num_iterations
        scale = schedule(args.schedule, at, args.num_iterations, args.warmup_steps)
        optimizer.step(scale)
        optimizer.zero_grad()
        dt = time.perf_counter() - t0
        if limit < math.inf:
            dt = all_reduce(dt, device, dist.ReduceOp.MAX)  # all ranks end at the same step
        # ------------------------------------------------------------------ log
        counts = sum((Counter(b.counts) for b in micro), Counter())
        counts = dict(zip(sampler.counters, all_reduce([counts[k] for k in sampler.counters], device)))
        tokens, images, positions = (counts.pop(k) for k in ("slots", "images", "positions"))
        state["data"] = {k: state["data"].get(k, 0) + int(n) for k, n in counts.items()}
        state["seconds"] += dt
        state["waited"] += wait
        state["images"] += int(images)
        state["flops"] += flops * world
        step += 1
        record = {"step": step - 1, "train/loss": train_loss, "train/lr": args.lr * scale, "train/grad_norm": gnorm, "train/dt": dt,
                  "train/tok_per_sec": tokens / dt, "train/img_per_sec": images / dt, "train/mfu": flops / dt / peak,
                  "train/total_flops": state["flops"], "train/total_seconds": state["seconds"], "data/wait": wait / dt,
                  "data/padding": 1 - positions / tokens, **{f"data/{k}": n for k, n in state["data"].items()}}
        records.log(record)
        eta = min((args.num_iterations - step) * state["seconds"] / step, limit - state["seconds"])
        print0(f"step {step - 1:05d}/{args.num_iterations:05d} ({100 * step / args.num_iterations:.1f}%) | loss {train_loss:.4f} | lr {scale:.2f} | "
               f"gnorm {gnorm:.2f} | dt {dt * 1000:.0f} ms (data {100 * wait / dt:.0f}%) | {tokens / dt:,.0f} tok/s | {images / dt:.1f} img/s | "
               f"mfu {100 * flops / dt / peak:.1f}% | {state['seconds'] / 60:.1f} min | eta {eta / 60:.1f} min")

    summary = {"stage": stage, "steps": step, "minutes": round(state["seconds"] / 60, 2), "images_per_sec": state["images"] / state["seconds"],
               "mfu": state["flops"] / world / state["seconds"] / peak, "data_wait": state["waited"] / state["seconds"],
               "params": model.num_params(), "min_val_loss": state["best"],
               "min_val_loss_step": state["best_step"], **state["last_eval"], "data": state["data"], "commit": meta["commit"], "seed": args.seed}
    if rank == 0:
        draw_curves(records.read(), os.path.join(run_dir, "curves.png"))
        write_json(os.path.join(run_dir, "summary.json"), summary)
    wandb_run.finish()
    print0(f"min val loss {state['best']:.4f} at step {state['best_step']}; curves in {os.path.join(run_dir, 'curves.png')}")
    return summary
