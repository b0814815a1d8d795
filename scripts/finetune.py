"""
Fine-tunes a trained checkpoint on pages of your own, and reads held-out pages before and after.

    python -m scripts.finetune --checkpoint=checkpoints/stage2 --data=folder:DIR --model-tag=mine
    torchrun --standalone --nproc_per_node=8 -m scripts.finetune -- --data=folder:DIR
    python -m scripts.finetune --data=folder:DIR=1,synthdoc=1 --freeze-sam  # keeps what it knows

Weights, tokenizer, mode and page settings are the checkpoint's. Writes checkpoints/<model-tag>/
as any training run does; summary.json has the scores before and after.
"""
import os
from contextlib import nullcontext

import torch

from nanochat.checkpoint import load_model
from nanochat.common import (
    ArgumentParser, choose_compile, choose_dtype, compute_init, dist_info, is_master, json_line,
    matmul_rate, print0, run_main, write_json)
from nanochat.conversation import truth_of
from nanochat.dataloader import Sampler, ahead, loader
from nanochat.engine import Engine
from nanochat.evaluator import Evaluator, read_pages
from nanochat.heads import LABELS, loss_weights, make_heads
from nanochat.image_modes import get_mode
from nanochat.loop import (
    account, add_training_arguments, console_line, due, evaluate, figures_of_step, lr_multiplier,
    parse_part_lrs, refuse_without_effect, row_multiple, train_step, wrap_model)
from nanochat.metrics import score_page, summarize
from nanochat.mixture import fingerprints
from nanochat.optim import Optimizer
from nanochat.pretrained import find
from nanochat.reader import NEEDED
from nanochat.run import Run, samples_per_step
from tasks.registry import (
    add_data_arguments, choose_losses, letters_set, refuse_ignored, training_sets)

# Settings of the checkpoint's run that hold here too unless they are given on the command line.
INHERITED = ("mode", "chars", "faces", "min_px", "random_share", "max_seq_len", "damage",
             "text_files", "page_parts", "val_share")
READ_PAGES = 256  # held-out pages read before and after, at most
READ_BATCH = 32


def make_parser():
    parser = ArgumentParser(__doc__)
    parser.add_argument("--checkpoint", default="checkpoints/stage2",
                        help="model_<step> folder, or a run folder (then its last)")
    parser.add_argument("--freeze-sam", action="store_true",
                        help="train the second stage of the encoder, projector and decoder only")
    add_data_arguments(parser)
    add_training_arguments(parser, model_tag="finetune", num_iterations=150, lr=1e-3,
                           matrix_lr=0.005, save_every=50)
    parser.show_inherited(INHERITED, "the checkpoint")
    return parser


def read_held_out(model, tokenizer, mode, task, indices):
    """{samples, one_minus_ned, ci95, cer} of the held-out pages `indices`, read greedily."""
    engine = Engine(model.eval(), tokenizer, mode)
    scores = []
    for first in range(0, len(indices), READ_BATCH):
        batch = [task[i] for i in indices[first:first + READ_BATCH]]
        for conversation, text, _ in read_pages(engine, batch):
            truth = truth_of(conversation)
            # how Chinese is cut into words does not matter to these figures
            scores.append(score_page(text, truth, by_character=True))
    summary = summarize(scores)
    return {name: summary[name] for name in ("samples", "one_minus_ned", "ci95", "cer")}


def main(argv=None):
    parser = make_parser()
    args = parser.parse_args(argv)
    given = parser.given(argv)
    refuse_without_effect(given, args)
    refuse_ignored(given, args.data)

    # -------------------------------------------------------------------------
    # Compute init
    device = compute_init(args.device_type)
    dtype = choose_dtype(device, args.dtype)
    compiled = choose_compile(device, args.compile)
    rank, _, world_size = dist_info()
    batch_size = samples_per_step(args)
    accumulate = batch_size // (args.device_batch_size * world_size)

    # -------------------------------------------------------------------------
    # Model and tokenizer; the settings of the checkpoint's run are this run's defaults
    folder = find(args.checkpoint)
    print0(f"loading {folder}")
    model, tokenizer, meta = load_model(folder, device, needed=NEEDED)
    theirs = {k: v for k, v in meta["user_config"].items() if k in INHERITED}
    theirs["mode"] = meta["mode"]  # the one validated in, where it was trained in several
    args = parser.inherit(argv, theirs, os.path.join(folder, "meta.json"))
    if "windows" in meta:
        print0(f"NOTE: {args.checkpoint} reads pages of any size in windows; here they are resized "
               f"to its image mode {args.mode}, and the fine-tuned model will read them so")
    positions = model.cfg.gpt.sequence_len
    if args.max_seq_len > positions:
        raise ValueError(f"--max-seq-len={args.max_seq_len}: the decoder of {args.checkpoint} has "
                         f"{positions} positions")
    choose_losses(args, local=0.0, place=0.0)  # a user's pages rarely have letter labels
    run = Run(args, "fine-tuning")
    if args.freeze_sam:
        model.freeze(["sam", "compressor"])
    model.recompute(args.recompute)
    model.dtype = dtype
    # Of the local reading loss and the place loss, for training only: not saved with the model.
    heads = make_heads(model, args.local_loss, args.place_loss)  # None where both are off

    # -------------------------------------------------------------------------
    # Data: conversations, and how they become rows of tokens and pixels
    modes = [get_mode(name) for name in args.mode.split(",")]
    layout = model.cfg.layout
    n_samples = args.num_iterations * batch_size
    task, val_task = training_sets(args, model.cfg.sam.image_size, n_samples, args.ramp)
    run.check_data(fingerprints(task, val_task))
    limits = dict(max_tokens=args.max_seq_len, max_images=args.max_images,
                  too_long=args.too_long, bad_data=args.bad_data)
    multiple = row_multiple(args, compiled)
    labels = LABELS if heads is not None else ()
    sampler = Sampler(task, tokenizer, modes, layout, pack=args.pack, multiple=multiple,
                      labels=labels, **limits)
    evaluator = Evaluator(tokenizer, modes[0], layout, limits, val_task, args.eval_pages, heads,
                          letters_set(args, model.cfg.sam.image_size))

    # -------------------------------------------------------------------------
    # Optimizer
    optimizer = Optimizer(model, args.optimizer, args.lr, args.matrix_lr, args.weight_decay,
                          dtype=dtype, part_lrs=parse_part_lrs(args.part_lr),
                          heads=heads)

    # -------------------------------------------------------------------------
    # Start: read the held-out pages as they are read now, then resume or begin
    held_out, _ = evaluator.usable(val_task, READ_PAGES)
    print0(f"reading {len(held_out)} held-out pages, as the model is now")
    before = read_held_out(model, tokenizer, modes[0], val_task, held_out)
    print0(f"before: {before}")
    if run.start is not None:
        run.load(model, optimizer, tokenizer)
    step = run.start or 0
    streams = run.streams_of(rank)
    batches = loader(sampler, args.device_batch_size, step * accumulate,
                     args.num_iterations * accumulate, rank, world_size, args.workers,
                     pin_memory=device.type == "cuda", states=streams)
    batches = ahead(batches, device)
    net = wrap_model(model, compiled, heads)
    peak_flops = matmul_rate(device, dtype)
    run.begin(tokenizer, modes[0])
    model.train()

    # -------------------------------------------------------------------------
    # The loop
    weights = loss_weights(args.local_loss, args.place_loss)
    while True:
        progress = run.progress(step)
        last = progress >= 1
        fresh = step != run.start  # a resumed run has evaluated and saved this step already
        save_now = fresh and (last or (step > 0 and due(step, args.save_every)))
        evaluate_now = fresh and (save_now or due(step, args.eval_every))
        if evaluate_now:
            evaluate(run, step, model, evaluator, eager=compiled)
        if save_now:
            run.save(step, model, tokenizer, optimizer, streams)
        if last:
            break
        scale = lr_multiplier(args, step, progress)
        result = train_step(step, net, optimizer, batches, accumulate, scale, args.grad_clip,
                            sampler.counters, weights, agree_on_time=args.max_minutes > 0)
        streams.update(result.streams)
        account(run, result)
        figures = figures_of_step(run, result, args.lr * scale, peak_flops)
        run.record(step, figures)
        print0(console_line(run, step, figures, scale))
        step += 1

    # -------------------------------------------------------------------------
    # What it gained
    summary = run.finish(step, model, peak_flops)
    summary["before"] = before
    print0(f"reading the same {len(held_out)} pages again")
    # Eagerly, as within the loop: pages differ in every size that compiled blocks are made for.
    with torch.compiler.set_stance("force_eager") if compiled else nullcontext():
        summary["after"] = read_held_out(model, tokenizer, modes[0], val_task, held_out)
    if is_master():
        write_json(os.path.join(run.folder, "summary.json"), summary)
    json_line(summary)


if __name__ == "__main__":
    run_main(main)
