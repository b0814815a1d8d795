"""
Stage 2: the encoder of stage 1 meets a fresh decoder, on pages and text-only chat mixed.

    python -m scripts.vis_mid_train                                  # one process, after stage 1
    torchrun --standalone --nproc_per_node=8 -m scripts.vis_mid_train -- --optimizer=adamw \
        --lr=3e-5 --schedule=step --run=stage2
    python -m scripts.vis_mid_train --encoder=checkpoints/try --num-iterations=20 --model-tag=try2

(Paper: section 3.5.2. The third line is a trial that takes seconds on a CPU.)
SAM and compressor are frozen; the second stage of the encoder (CLIP), the projector and the
decoder learn. Sizes come from the encoder's checkpoint. Writes checkpoints/<model-tag>/.
"""
import os

from nanochat import pretrained
from nanochat.checkpoint import load_encoder, read_config, read_record, resuming
from nanochat.common import (
    ArgumentParser, choose_compile, choose_dtype, compute_init, dist_info, dtype_name, integer,
    json_line, matmul_rate, print0, run_main)
from nanochat.dataloader import Sampler, ahead, loader
from nanochat.evaluator import Evaluator
from nanochat.heads import LABELS, loss_weights, make_heads
from nanochat.image_modes import get_mode
from nanochat.loop import (
    account, add_training_arguments, console_line, due, evaluate, figures_of_step, lr_multiplier,
    parse_part_lrs, refuse_without_effect, row_multiple, train_step, wrap_model)
from nanochat.mixture import Mixture, fingerprints
from nanochat.model import DeepseekOCR
from nanochat.optim import Optimizer
from nanochat.run import Run, samples_per_step
from tasks.registry import (
    add_data_arguments, choose_losses, letters_set, parse_data, refuse_ignored, training_sets)
from tasks.synthchat import SynthChat

# Settings of stage 1 that hold here too unless they are given on the command line.
INHERITED = ("tokenizer", "mode", "chars", "faces", "min_px", "random_share", "max_seq_len",
             "damage", "text_files", "page_parts", "val_share")


def make_parser():
    parser = ArgumentParser(__doc__)
    # Model
    parser.add_argument("--encoder", default="checkpoints/stage1",
                        help="deepencoder_<step> folder, stage-1 run folder or hub name")
    parser.add_argument("--gpt", default="", help="nanochat checkpoint the decoder starts from, "
                        "hub name or folder; empty = random weights")
    parser.add_argument("--tokenizer", default="checkpoints/tokenizer",
                        help="folder of scripts.tok_train")
    # Data
    parser.add_argument("--text-share", type=integer(0, 99), default=10,
                        help="built-in text-only chat, in a hundred samples, beside --data")
    add_data_arguments(parser, ramp=4800)
    add_training_arguments(parser, model_tag="stage2", num_iterations=900, eval_every=180,
                           save_every=180)
    parser.show_inherited(INHERITED, "stage 1")
    return parser


def main(argv=None):
    parser = make_parser()
    args = parser.parse_args(argv)
    given = parser.given(argv)
    refuse_without_effect(given - {"encoder"}, args)
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
    # What stage 1 was, and what of it holds here
    encoder_dir = pretrained.find(args.encoder, "deepencoder")
    cfg = read_config(encoder_dir)
    stage1 = read_record(encoder_dir, "meta.json", keys={"user_config": dict, "tokenizer": str})
    print0(f"encoder: {encoder_dir}")
    theirs = {k: v for k, v in stage1["user_config"].items() if k in INHERITED}
    args = parser.inherit(argv, theirs, os.path.join(encoder_dir, "meta.json"))
    # What letters look like is SAM's, which is frozen by now; the new decoder has places to learn.
    choose_losses(args, local=0.0, place=0.3)
    run = Run(args, "stage 2")

    # -------------------------------------------------------------------------
    # Tokenizer and model
    tokenizer = pretrained.choose_decoder(cfg, args)
    if tokenizer.fingerprint() != stage1["tokenizer"]:
        print0("NOTE: another tokenizer than stage 1's; the decoder is fresh, so this is allowed")
    # Another seed than stage 1's: the decoder must not be its initial one again.
    model = DeepseekOCR(cfg).init_weights(args.seed + 1)
    load_encoder(encoder_dir, model)
    if args.gpt and not resuming(args):
        pretrained.load_nanochat(model.gpt, args.gpt)
    model.freeze(["sam", "compressor"])  # paper, section 3.5
    model.recompute(args.recompute)
    model.to(device)
    model.dtype = dtype
    # Of the local reading loss and the place loss, for training only: not saved with the model.
    heads = make_heads(model, args.local_loss, args.place_loss)  # None where both are off

    # -------------------------------------------------------------------------
    # Data: pages and chat mixed, and how they become rows of tokens and pixels
    mode_names = args.mode.split(",") if args.mode else cfg.modes[:1]
    modes = [get_mode(name) for name in mode_names]
    # Mixtures hold whole cycles only: one of pages and chat, each page from a cycle of --data.
    cycle = 100 * sum(share for _, _, share in parse_data(args.data))
    n_samples = args.num_iterations * batch_size + cycle
    task, val_task = training_sets(args, cfg.sam.image_size, n_samples, args.ramp)
    if args.text_share:
        chat = SynthChat("train", n_samples, seed=args.seed)
        task = Mixture([(task, 100 - args.text_share), (chat, args.text_share)])
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
        run.load(model, optimizer, tokenizer)
    step = run.start or 0
    streams = run.streams_of(rank)
    batches = loader(sampler, args.device_batch_size, step * accumulate,
                     args.num_iterations * accumulate, rank, world_size, args.workers,
                     pin_memory=device.type == "cuda", states=streams)
    batches = ahead(batches, device)
    net = wrap_model(model, compiled, heads)
    peak_flops = matmul_rate(device, dtype)
    print0(f"stage 2: {model.num_params():,} parameters, {optimizer.num_params():,} trained; "
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
    summary = run.finish(step, model, peak_flops)
    json_line(summary)


if __name__ == "__main__":
    run_main(main)
