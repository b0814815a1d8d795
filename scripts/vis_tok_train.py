"""
Stage 1: DeepEncoder, projector and a decoder learn to read together, by next-token prediction.

    python -m scripts.vis_tok_train                                  # one process, nano
    torchrun --standalone --nproc_per_node=8 -m scripts.vis_tok_train -- --preset=base --run=stage1
    python -m scripts.vis_tok_train --preset=tiny --num-iterations=20 --chars=10-12 --model-tag=try

(Paper: section 3.5.1. The third line is a trial that takes seconds on a CPU.)
Writes checkpoints/<model-tag>/model_<step>/, and beside each deepencoder_<step>/, the encoder
alone, which stage 2 starts from.
"""
import torch

from nanochat import pretrained
from nanochat.checkpoint import load_model, resuming
from nanochat.common import (
    ArgumentParser, choose_compile, choose_dtype, compute_init, dist_info, dtype_name, json_line,
    matmul_rate, print0, run_main)
from nanochat.config import PRESETS
from nanochat.dataloader import Sampler, ahead, loader
from nanochat.evaluator import Evaluator
from nanochat.heads import LABELS, loss_weights, make_heads
from nanochat.image_modes import get_mode
from nanochat.loop import (
    account, add_training_arguments, console_line, due, evaluate, figures_of_step, lr_multiplier,
    parse_part_lrs, refuse_without_effect, row_multiple, train_step, wrap_model)
from nanochat.mixture import fingerprints
from nanochat.model import DeepseekOCR
from nanochat.optim import Optimizer
from nanochat.run import Run, samples_per_step
from tasks.registry import (
    add_data_arguments, choose_losses, letters_set, refuse_ignored, training_sets)


def parse_args(argv):
    parser = ArgumentParser(__doc__)
    # Model
    parser.add_argument("--preset", default="nano", choices=sorted(PRESETS),
                        help="sizes of the model (nanochat/config.py)")
    # Published weights to start from
    parser.add_argument("--sam", default="", help=f"SAM, hub name or folder, e.g. "
                        f"{pretrained.SAM}; empty = random weights")
    parser.add_argument("--clip", default="", help=f"CLIP, e.g. {pretrained.CLIP}")
    parser.add_argument("--encoder", default="", help=f"whole encoder, e.g. {pretrained.DEEPSEEK}")
    parser.add_argument("--gpt", default="", help="decoder, e.g. nanochat-students/base-d20")
    parser.add_argument("--init", default="", help="checkpoint or run folder of an earlier stage 1 "
                        "whose model learns on, under another schedule or on other data")
    parser.add_argument("--freeze", default="", help="for little data: parts kept as loaded, with "
                        "commas, of sam (without the compressor), clip, gpt")
    parser.add_argument("--tokenizer", default="checkpoints/tokenizer",
                        help="folder of scripts.tok_train; a published decoder brings its own")
    add_data_arguments(parser, chars="31-41x4,16-30x1", ramp=12800)
    add_training_arguments(parser, model_tag="stage1", num_iterations=950, eval_every=190,
                           save_every=190)
    args = parser.parse_args(argv)
    given = parser.given(argv)
    refuse_without_effect(given, args)
    refuse_ignored(given, args.data)
    choose_losses(args, local=1.0, place=0.3)
    return args


def check_frozen(parts, args):
    """ValueError if a part would stay as it was drawn at random: nothing could learn through it."""
    if args.init:
        return
    loaded = {
        "sam": args.sam or args.encoder,
        "compressor": args.encoder,
        "clip": args.clip or args.encoder,
        "projector": args.encoder,
        "gpt": args.gpt,
        "embedding": args.gpt,
        "head": args.gpt,
    }
    random_parts = [part for part in parts if not loaded.get(part, True)]
    if random_parts:
        raise ValueError(f"--freeze={args.freeze}: {', '.join(random_parts)} would keep random "
                         f"weights, through which nothing can learn to read: load published ones "
                         f"with --sam, --clip, --encoder or --gpt, or do not freeze them")


def main(argv=None):
    args = parse_args(argv)

    # -------------------------------------------------------------------------
    # Compute init
    device = compute_init(args.device_type)
    dtype = choose_dtype(device, args.dtype)
    compiled = choose_compile(device, args.compile)
    rank, _, world_size = dist_info()
    batch_size = samples_per_step(args)
    accumulate = batch_size // (args.device_batch_size * world_size)
    run = Run(args, "stage 1")

    # -------------------------------------------------------------------------
    # Tokenizer and model
    if args.init:
        model, tokenizer, _ = load_model(pretrained.find(args.init), device)
        cfg = model.cfg
        if args.max_seq_len > cfg.gpt.sequence_len:
            raise ValueError(f"--max-seq-len={args.max_seq_len}: the decoder of {args.init} has "
                             f"{cfg.gpt.sequence_len} positions")
        torch.manual_seed(args.seed)  # as init_weights does, for what is drawn after the model
    else:
        cfg = PRESETS[args.preset]()
        tokenizer = pretrained.choose_decoder(cfg, args)
        model = DeepseekOCR(cfg).init_weights(args.seed)
    if not resuming(args):  # a checkpoint of our own replaces published weights anyway
        if args.sam:
            pretrained.load_sam(model, args.sam)
        if args.clip:
            pretrained.load_clip(model, args.clip)
        if args.encoder:
            pretrained.load_deepseek(model, args.encoder)
        if args.gpt:
            pretrained.load_nanochat(model.gpt, args.gpt)
    frozen = args.freeze.split(",") if args.freeze else []
    check_frozen(frozen, args)
    model.freeze(frozen)
    model.recompute(args.recompute)
    model.to(device)
    model.dtype = dtype
    # Of the local reading loss and the place loss, for training only: not saved with the model.
    heads = make_heads(model, args.local_loss, args.place_loss)  # None where both are off

    # -------------------------------------------------------------------------
    # Data: conversations, and how they become rows of tokens and pixels
    mode_names = args.mode.split(",") if args.mode else cfg.modes[:1]
    modes = [get_mode(name) for name in mode_names]
    n_samples = args.num_iterations * batch_size
    task, val_task = training_sets(args, cfg.sam.image_size, n_samples, args.ramp)
    run.check_data(fingerprints(task, val_task))
    limits = dict(max_tokens=args.max_seq_len, max_images=args.max_images,
                  too_long=args.too_long, bad_data=args.bad_data)
    multiple = row_multiple(args, compiled)
    labels = LABELS if heads is not None else ()
    sampler = Sampler(task, tokenizer, modes, cfg.layout, pack=args.pack, multiple=multiple,
                      labels=labels, **limits)
    evaluator = Evaluator(tokenizer, modes[0], cfg.layout, limits, val_task, args.eval_pages, heads,
                          letters_set(args, cfg.sam.image_size))

    # -------------------------------------------------------------------------
    # Optimizer
    optimizer = Optimizer(model, args.optimizer, args.lr, args.matrix_lr, args.weight_decay,
                          dtype=dtype, part_lrs=parse_part_lrs(args.part_lr),
                          heads=heads)

    # -------------------------------------------------------------------------
    # Start: resume from this run's last checkpoint, else from what the model holds now
    if run.start is not None:
        run.load(model, optimizer, tokenizer, with_encoder=True)
    step = run.start or 0
    streams = run.streams_of(rank)
    batches = loader(sampler, args.device_batch_size, step * accumulate,
                     args.num_iterations * accumulate, rank, world_size, args.workers,
                     pin_memory=device.type == "cuda", states=streams)
    batches = ahead(batches, device)
    net = wrap_model(model, compiled, heads)
    peak_flops = matmul_rate(device, dtype)
    print0(f"stage 1: {model.num_params():,} parameters, {optimizer.num_params():,} trained; "
           f"{device.type} x {world_size}, {dtype_name(dtype)}, "
           f"{'compiled' if compiled else 'eager'}, matmul {peak_flops / 1e9:,.0f} GFLOP/s; "
           f"{batch_size} samples a step")
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
            run.save(step, model, tokenizer, optimizer, streams, with_encoder=True)
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
    summary = run.finish(step, model, peak_flops)
    json_line(summary)


if __name__ == "__main__":
    run_main(main)
