"""
The named steps of a training run: train_step, evaluate, account, log. A stage's script builds the
model, the optimizer and the data in the open and strings these together; it decides when each is
due, what the learning rate is, and what is printed.
"""
import argparse
import math
import time
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from nanochat.checkpoint import LARGEST_SIZE
from nanochat.common import (
    all_reduce, banner, every_or_never, get_world_size, integer, natural, positive,
    positive_int, print0, real)
from nanochat.conversation import truth_of
from nanochat.heads import WithHeads
from nanochat.model import forward_flops
from nanochat.optim import schedule

BLIND_GAP = 0.05  # nats per character: with a smaller gap the page is as good as ignored
LOST = 1.2  # a loss of so many times log(vocabulary) is worse than knowing nothing at all
LOST_STEPS = 50  # in a row, before a warning; a bad start or a spike is shorter

# -----------------------------------------------------------------------------
# Flags that every training script has


def add_training_arguments(parser, **defaults):
    """Adds the flags of a training run; defaults by keyword, as in args."""
    flag = parser.add_argument

    # Logging
    flag("--run", default="dummy", help="W&B run name; dummy = no W&B")
    # Runtime
    flag("--device-type", default="", help="cuda, mps or cpu; empty = the best there is")
    flag("--dtype", default="auto",
         help="compute dtype: auto (bfloat16 where the hardware has it), bfloat16, float32")
    flag("--compile", default="auto", choices=["auto", "yes", "no"],
         help="torch.compile; auto: on CUDA where a compiler is found")
    flag("--seed", type=natural, default=0, help="seed of weights and data")
    flag("--workers", type=integer(0, off=-1), default=0,
         help="data loader processes per rank; -1 = this rank's share of the cores but two, at "
              "most 24")
    flag("--recompute", action="store_true",
         help="activation checkpointing: a third more compute, far less memory")
    # From conversations to rows of tokens
    flag("--mode", default="", help="image mode; several with commas are taken in turn, and "
         "validation uses the first; empty = the preset's first")
    flag("--max-seq-len", type=integer(2, LARGEST_SIZE), default=256,
         help="decoder positions per sample, image included")
    flag("--max-images", type=positive_int, default=16,
         help="images per sample, and per packed row")
    flag("--pack", type=natural, default=0,
         help="positions of a row that holds several samples; 0 = one a row")
    flag("--too-long", default="raise", choices=["raise", "clip", "drop"],
         help="samples over --max-seq-len or --max-images; clip cuts their text")
    flag("--bad-data", default="raise", choices=["raise", "skip"],
         help="samples that cannot be used: stop, or count them and go on")
    # Training horizon
    flag("--num-iterations", type=positive_int, help="optimizer steps")
    flag("--max-minutes", type=real(above=True, off=-1), default=-1,
         help="end the stage after this many minutes of steps, with the learning rate at zero by "
              "then; -1 = no limit")
    flag("--device-batch-size", type=positive_int, default=32,
         help="samples per micro-batch and rank; lower it when out of memory")
    flag("--total-batch-size", type=every_or_never, default=-1,
         help="samples per optimizer step over all ranks; -1 = one micro-batch per rank")
    # Optimizer
    flag("--optimizer", default="muon", choices=["muon", "adamw"],
         help="muon: Muon for matrices and convolutions, AdamW for the rest")
    flag("--lr", type=positive, default=3e-3, help="AdamW's learning rate")
    flag("--matrix-lr", type=positive, default=0.02, help="Muon's learning rate")
    flag("--part-lr", default="", help="AdamW's rate for single parts, Muon's follows in "
         "proportion, e.g. sam=5e-5,compressor=1e-3 (parts: sam, compressor, clip, projector, "
         "gpt, embedding, head)")
    flag("--weight-decay", type=real(), default=0.0, help="AdamW's weight decay")
    flag("--schedule", default="trapezoid", choices=["trapezoid", "cosine", "step"],
         help="learning rate over the run")
    flag("--warmup-steps", type=natural, default=20, help="steps of linear warm-up")
    flag("--grad-clip", type=real(above=True, off=-1), default=1.0,
         help="limit of the global gradient norm; -1 = off")
    flag("--local-loss", type=real(off=-1), default=-1,
         help="weight of the local reading loss, which asks each vision token of a rendered page "
              "which letters it shows; 0 = off; -1 = 1 in stage 1 where --data has rendered pages, "
              "else off")
    flag("--place-loss", type=real(off=-1), default=-1,
         help="weight of the place loss, which asks the decoder before each character where on a "
              "rendered page that stands; 0 = off; -1 = 0.3 in both stages where --data has "
              "rendered pages, else off")
    # Evaluation
    flag("--eval-every", type=every_or_never, default=100,
         help="steps between evaluations; -1 = only at the end")
    flag("--eval-pages", type=integer(2), default=64, help="held-out pages that validation takes")
    # Output
    flag("--model-tag", help="run folder under --checkpoints")
    flag("--checkpoints", default="checkpoints", help="where run folders are written")
    flag("--save-every", type=every_or_never, default=100,
         help="steps between checkpoints; -1 = only at the end")
    flag("--resume", action="store_true",
         help="go on from the run folder's last checkpoint")
    parser.set_defaults(**defaults)


# (flag, another flag beside which it has no effect, that flag's value or None for any)
WITHOUT_EFFECT = [
    ("matrix_lr", "optimizer", "adamw"),  # Muon's
    ("primer", "ramp", 0),                # is the beginning of the curriculum
    ("tokenizer", "gpt", None),           # a published decoder brings its own
    ("sam", "encoder", None),             # has a SAM and a CLIP
    ("clip", "encoder", None),
    ("preset", "init", None),             # an earlier run's sizes, weights and tokenizer
    ("tokenizer", "init", None),
    ("sam", "init", None),
    ("clip", "init", None),
    ("encoder", "init", None),
    ("gpt", "init", None),
]


def refuse_without_effect(given, args):
    """ValueError if a flag of `given`, names of those on the command line, has no effect."""
    for flag, other, value in WITHOUT_EFFECT:
        if value is None:
            overruled = other in given
        else:
            overruled = getattr(args, other) == value
        if flag in given and overruled:
            raise ValueError(f"--{flag.replace('_', '-')} has no effect beside "
                             f"--{other}={getattr(args, other)}: leave one of them out")


def parse_part_lrs(text):
    """"sam=5e-5,compressor=1e-3" -> {"sam": 5e-5, "compressor": 1e-3}"""
    rates = {}
    for piece in filter(None, text.split(",")):
        part, _, rate = piece.partition("=")
        try:
            rates[part] = real()(rate)
        except argparse.ArgumentTypeError:
            raise ValueError(f"--part-lr={text}: {piece!r} is not PART=RATE, "
                             f"e.g. compressor=1e-3") from None
    return rates


def lr_multiplier(args, step, progress):
    """Multiplier of every learning rate. progress: share of the run that is done, 0 to 1."""
    if step < args.warmup_steps:
        return (step + 1) / args.warmup_steps
    return schedule(args.schedule, progress)


def due(step, every):
    """Whether something that happens every so many steps happens now; every=-1: never."""
    return every > 0 and step % every == 0


# -----------------------------------------------------------------------------
# Set-up


def row_multiple(args, compiled):
    """
    Rows are padded to a multiple of this many positions. Compiled kernels are made for one shape
    each, so there rows come in four lengths only; eager ones take any.
    """
    if not compiled:
        return 1
    if args.pack:
        return 64  # compiled blocks take any number of packed positions; products like round ones
    longest = args.max_seq_len
    return longest if longest % 4 else longest // 4


def wrap_model(model, compiled, heads=None):
    """
    The model as the step calls it: blocks compiled if asked for, with the heads that learn beside
    it if there are any, DDP over several ranks.
    """
    if compiled:
        print0("torch.compile: the first steps take from seconds to minutes")
        model.compile_blocks()
    net = model if heads is None else WithHeads(model, heads)
    if get_world_size() == 1:
        return net
    # The only buffers are the decoder's rotary tables, which no step changes: not broadcast.
    # Gradients live in the buckets that travel, so there is no second copy of them (2.2 GB in
    # `base`).
    return DistributedDataParallel(net, broadcast_buffers=False, gradient_as_bucket_view=True)


def unwrap(net):
    """Of what `wrap_model` gives: -> (what computes the losses, the model)."""
    learner = net.module if isinstance(net, DistributedDataParallel) else net
    model = learner.model if isinstance(learner, WithHeads) else learner
    return learner, model


# -----------------------------------------------------------------------------
# One training step


@dataclass
class StepResult:
    """What one optimizer step did and took. Times in seconds, of the slowest rank if limited."""
    losses: dict          # {name: mean over all that it is summed over, all ranks}, nats
    grad_norm: float      # before clipping
    seconds: float        # wall clock
    waited: float         # of these, waiting for data
    flops: float          # of this rank
    counts: dict          # images, positions, slots, bad, drawn/<task>, ..., over all ranks
    streams: dict         # {worker: where its stream goes on}, of this rank
    compiling: bool       # whether torch.compile built a kernel during this step


def train_step(step, net, optimizer, batches, accumulate, lr_scale, grad_clip, counters,
               loss_weights=None, agree_on_time=False):
    """
    One optimizer step: draw micro-batches, accumulate gradients, check, update. -> StepResult

    net            the model, as of wrap_model
    batches        iterator of Batch; `accumulate` of them make a step on this rank
    lr_scale       multiplies every learning rate
    counters       names of the counts that are summed up over the micro-batches
    loss_weights   {name: weight} of the model's named losses; default: the text loss alone
    agree_on_time  every rank reports the time of the slowest, so that all stop at the same step

    The host waits for the GPU once, for losses and gradient norm; the update then runs while the
    next batch is prepared. ValueError if a loss or the gradient is not finite: nothing is updated.
    """
    loss_weights = loss_weights or {"text": 1.0}
    graphs_before = compiled_graphs()

    start = time.perf_counter()
    micro_batches = [next(batches) for _ in range(accumulate)]
    waited = time.perf_counter() - start

    losses, flops = accumulate_gradients(net, micro_batches, loss_weights)
    if "text" not in losses:
        raise ValueError(f"step {step}: no supervised token in the whole batch")
    grad_norm = optimizer.clip_grad_norm(grad_clip)
    losses, grad_norm = to_host(losses, grad_norm)
    check_finite(step, losses, grad_norm)
    optimizer.step(lr_scale)
    optimizer.zero_grad()

    seconds = time.perf_counter() - start
    compiling = compiled_graphs() != graphs_before
    if agree_on_time:
        # Whether the step counts, too: ranks may compile for different steps.
        seconds = all_reduce(seconds, dist.ReduceOp.MAX)
        compiling = all_reduce(float(compiling), dist.ReduceOp.MAX) > 0
    counts = sum((Counter(batch.counts) for batch in micro_batches), Counter())
    totals = all_reduce([counts[name] for name in counters])
    states = [batch.state for batch in micro_batches if batch.state]
    return StepResult(
        losses=losses,
        grad_norm=grad_norm,
        seconds=seconds,
        waited=waited,
        flops=flops,
        counts=dict(zip(counters, totals)),
        streams={str(state["worker"]): state for state in states},
        compiling=compiling,
    )


def compiled_graphs():
    """Graphs that torch.compile has built in this process so far."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def count_losses(learner, micro_batches, names):
    """{name: what the loss is summed over, in all micro-batches of all ranks}"""
    totals = dict.fromkeys(names, 0)
    for batch in micro_batches:
        counts = learner.loss_counts(batch)
        for name in totals:
            totals[name] += counts[name]
    return dict(zip(totals, all_reduce(list(totals.values()))))


def accumulate_gradients(net, micro_batches, loss_weights):
    """
    Forward and backward of each micro-batch. -> ({name: mean loss as a tensor, this rank's part},
    FLOPs). Every loss is a mean over the whole step, over all micro-batches and ranks; one that has
    no term there is left out.
    """
    learner, model = unwrap(net)
    world_size = get_world_size()
    totals = {}
    flops = 0.0
    loss_counts = None
    for i, batch in enumerate(micro_batches):
        if world_size > 1:  # gradients travel once, with the last micro-batch
            net.require_backward_grad_sync = i == len(micro_batches) - 1
        named_losses = net(batch)
        if loss_counts is None:
            # The host counts letters, which takes its time, while the GPU computes what it has just
            # been given.
            loss_counts = count_losses(learner, micro_batches, loss_weights)
        weighted = 0.0
        for name, (nats, _) in named_losses.items():
            if name not in loss_weights:
                continue
            # A loss that has no term in the whole step is zero, and still gives its parameters
            # the gradient that DDP waits for.
            loss = nats / max(1, loss_counts[name])
            weighted = weighted + loss_weights[name] * loss
            if not loss_counts[name]:
                continue  # there is no mean to log
            # fp64 where there is any: a sum of many small numbers
            part = loss.detach() if loss.device.type == "mps" else loss.detach().double()
            totals[name] = totals.get(name, 0.0) + part
        # In this thread: torch.compile keeps its settings and guards per thread, and would compile
        # the blocks that are recomputed once more in autograd's own.
        with torch.autograd.set_multithreading_enabled(False):
            # DDP averages over ranks, the losses are sums over them.
            (weighted * world_size).backward()
        flops += training_flops(model, batch)
    return totals, flops


def training_flops(model, batch):
    """FLOPs of forward and backward. Backward costs two forwards, but none for a frozen SAM."""
    images_per_side = {side: len(views) for side, views in batch.views.items()}
    rows, positions = batch.ids.shape
    forward = forward_flops(model.cfg, images_per_side, positions, rows, batch.supervised(),
                            batch.lengths)
    sam_learns = model.encoder.sam_model.pos_embed.requires_grad
    frozen = 0 if sam_learns else 2 * forward["sam"]
    return 3 * sum(forward.values()) - frozen


def to_host(losses, grad_norm):
    """({name: float over all ranks}, float): the one wait for the GPU in a step."""
    names = list(losses)
    first = next(iter(losses.values()))
    values = torch.stack([*losses.values(), grad_norm.to(first)]).tolist()
    totals = all_reduce(values[:-1])
    return dict(zip(names, totals)), values[-1]


def check_finite(step, losses, grad_norm):
    if all(math.isfinite(value) for value in (*losses.values(), grad_norm)):
        return
    values = ", ".join(f"{name} loss {value}" for name, value in losses.items())
    raise ValueError(f"step {step}: {values}, gradient norm {grad_norm}: not finite, stopped "
                     f"before the update; lower --lr / --matrix-lr, or look at the batch of this "
                     f"step")


# -----------------------------------------------------------------------------
# Evaluate, save, log


def evaluate(run, step, model, evaluator, eager=False):
    """
    Measures the model on the fixed pages, prints what was found and records it. -> figures
    eager: do not run compiled kernels, since every step of an evaluation has another shape.
    """
    # Announced, since a large model takes long over it.
    print0(f"step {step:05d} | evaluating, and reading {len(evaluator.pages)} pages")
    with torch.compiler.set_stance("force_eager") if eager else nullcontext():
        figures, pages_read = evaluator(model)
    val_loss = figures["val/loss"]
    if not math.isfinite(val_loss):
        raise ValueError(f"step {step}: validation loss {val_loss}: the last update corrupted the "
                         f"weights, nothing is saved; lower --lr / --matrix-lr")
    state = run.state
    if state.best is None or val_loss < state.best:
        state.best = val_loss
        state.best_step = step
    state.last_eval = figures
    totals = {"train/total_flops": state.flops, "train/total_seconds": state.seconds}
    run.record(step, {**figures, **totals})

    print0(evaluation_line(step, figures))
    show_pages(run, step, pages_read)
    if run.progress(step) >= 0.3 and figures["vision/gap"] < BLIND_GAP:
        banner(f"step {step}: vision/gap is {figures['vision/gap']:.4f} nats per character. The "
               f"model ignores the page: swapping all\nimages changes nothing. Look at "
               f"vision/cosine_*: near 1 = the encoder has collapsed\n(README, 'When it does not "
               f"read').")
    return figures


def with_prefix(figures, prefix):
    """{rest of the name: value} of the figures whose names begin with the prefix."""
    return {name.removeprefix(prefix): value
            for name, value in figures.items() if name.startswith(prefix)}


def evaluation_line(step, figures):
    """One line per evaluation."""
    parts = [
        f"step {step:05d}",
        f"val loss {figures['val/loss']:.4f}",
        f"1-NED {figures['val/one_minus_ned']:.3f}",
        f"gap {figures['vision/gap']:.3f} nats/char",
    ]
    for head in ("local", "place"):  # only in runs with that loss
        if f"vision/{head}_accuracy" in figures:
            parts.append(f"{head} accuracy {figures[f'vision/{head}_accuracy']:.3f}")
    cosines = with_prefix(figures, "vision/cosine_")
    parts.append("cosine " + " ".join(f"{depth} {value:.3f}" for depth, value in cosines.items()))
    return " | ".join(parts)


def show_pages(run, step, pages_read):
    """Pages with truth and prediction: two on the console, all as a table in W&B."""
    for conversation, prediction, score in pages_read[:2]:
        truth = truth_of(conversation)
        print0(f"  {score:.2f}  truth {truth!r}\n        reads {prediction!r}")
    if hasattr(run.wandb, "config"):  # a real run
        import wandb
        table = wandb.Table(columns=["page", "truth", "prediction", "1-NED"])
        for conversation, prediction, score in pages_read:
            picture = wandb.Image(conversation["images"][0])
            truth = truth_of(conversation)
            table.add_data(picture, truth, prediction, score)
        run.wandb.log({"val/pages": table, "step": step})


def account(run, result):
    """Adds one step to the run's totals. Time spent compiling does not count as training."""
    state = run.state
    watch_divergence(run, result.losses["text"])
    flops = result.flops * get_world_size()
    state.flops += flops
    if not result.compiling:
        state.seconds += result.seconds
        state.waited += result.waited
        state.timed_images += int(result.counts["images"])
        state.timed_flops += flops
    for name, n in result.counts.items():
        if name not in ("slots", "images", "positions"):  # those are of a step, not of the run
            state.data[name] = state.data.get(name, 0) + int(n)


def watch_divergence(run, loss):
    """Warns when a run has diverged for good: its loss is finite, so nothing else stops it."""
    state = run.state
    lost = loss > LOST * run.log_vocab
    state.lost_steps = state.lost_steps + 1 if lost else 0
    if state.lost_steps and state.lost_steps % LOST_STEPS == 0:
        banner(f"The loss is {loss:.2f} nats and has been above {LOST * run.log_vocab:.2f} for "
               f"{state.lost_steps} steps: a model that knows\nnothing has "
               f"{run.log_vocab:.2f}, the log of the vocabulary. The run has diverged: start again "
               f"with a lower\n--lr and --matrix-lr.")


def figures_of_step(run, result, lr, peak_flops):
    """The step's figures by name, as they go to metrics.jsonl, W&B and the console."""
    seconds = result.seconds
    figures = {
        "train/loss": result.losses["text"],
        "train/lr": lr,
        "train/grad_norm": result.grad_norm,
        "train/dt": seconds,
        "train/tok_per_sec": result.counts["positions"] / seconds,
        "train/img_per_sec": result.counts["images"] / seconds,
        "train/mfu": result.flops / seconds / peak_flops,
        "train/total_flops": run.state.flops,
        "train/total_seconds": run.state.seconds,
        "data/wait": result.waited / seconds,
        "data/padding": 1 - result.counts["positions"] / result.counts["slots"],
    }
    for name, loss in result.losses.items():
        if name != "text":
            figures[f"train/loss_{name}"] = loss
    for name, n in run.state.data.items():
        figures[f"data/{name}"] = n
    return figures


def console_line(run, step, figures, lr_scale):
    """One line per step."""
    total_steps = run.args.num_iterations
    done = step + 1
    seconds = run.state.seconds
    eta = min((total_steps - done) * seconds / done, run.limit - seconds)
    parts = [
        f"step {step:05d}/{total_steps:05d} ({100 * done / total_steps:.1f}%)",
        f"loss {figures['train/loss']:.4f}",
    ]
    for name, loss in with_prefix(figures, "train/loss_").items():
        parts.append(f"{name} {loss:.4f}")
    parts += [
        f"lr {lr_scale:.2f}",
        f"gnorm {figures['train/grad_norm']:.2f}",
        f"dt {1000 * figures['train/dt']:.0f} ms (data {100 * figures['data/wait']:.0f}%)",
        f"{figures['train/tok_per_sec']:,.0f} tok/s",
        f"{figures['train/img_per_sec']:.1f} img/s",
        f"mfu {100 * figures['train/mfu']:.1f}%",
        f"{seconds / 60:.1f} min",
        f"eta {eta / 60:.1f} min",
    ]
    return " | ".join(parts)
