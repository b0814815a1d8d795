"""
Fine-tunes a trained checkpoint on pages of your own, and reads their held-out part before and after.

    python -m scripts.finetune --checkpoint=checkpoints/stage2 --data=folder:DIR --model-tag=mine
    python -m scripts.finetune --data=folder:DIR=1,synthdoc=1 --freeze-sam        # half of it what it knows already

Weights, tokenizer, mode and page settings are the checkpoint's. Writes checkpoints/<model-tag>/ as any training run does.
"""
import os

from nanochat import checkpoint as ckpt
from nanochat.common import choose_dtype, compute_cleanup, compute_init, dist_info, json_line, print0, run_main, write_json
from nanochat.engine import Engine
from nanochat.gauges import read_pages
from nanochat.image_modes import get_mode
from nanochat.loop import samples_per_step, train, training_arguments
from nanochat.metrics import score_page, summarize
from tasks.synthdoc import MIN_PX
from tasks.registry import training_sets

INHERITED = ("chars", "faces", "min_px", "random_share", "max_seq_len")
MAX_PAGES, BATCH = 256, 32  # held-out pages read before and after


def read_held_out(model, tokenizer, mode, task):
    """{samples, one_minus_ned, ci95, cer} of the held-out pages, read greedily. Chinese words do not matter to these figures."""
    engine, rows, pages = Engine(model.eval(), tokenizer, mode), [], range(min(len(task), MAX_PAGES))
    for first in pages[::BATCH]:
        batch = [task[i] for i in pages[first:first + BATCH]]
        longest = max(len(tokenizer.encode(c["messages"][-1]["content"])) for c in batch)
        rows += [score_page(text, c["messages"][-1]["content"], by_character=True) for c, text, _ in read_pages(engine, batch, longest + 16)]
    return {name: value for name, value in summarize(rows).items() if name in ("samples", "one_minus_ned", "ci95", "cer")}


def main(argv=None):
    parser = training_arguments(__doc__.split("\n")[1], model_tag="finetune", num_iterations=150, lr=1e-3, matrix_lr=0.005, save_every=50)
    parser.add_argument("--checkpoint", default="checkpoints/stage2", help="model_<step> folder, or a run folder (then its last)")
    parser.add_argument("--freeze-sam", action="store_true", help="train CLIP, projector and decoder only")
    args = parser.parse_args(argv)
    device = compute_init(args.device_type)

    # model; its run's settings are this run's defaults
    model, tokenizer, meta = ckpt.load_model(args.checkpoint, device)
    parser.set_defaults(**{"min_px": MIN_PX, **{k: v for k, v in meta["user_config"].items() if k in INHERITED}, "mode": meta["mode"]})
    args = parser.parse_args(argv)
    model.dtype = choose_dtype(device, args.dtype)
    if args.freeze_sam:
        model.encoder.freeze_sam()

    # data
    task, val_task, statistics_task = training_sets(args, model.cfg.sam.image_size, args.num_iterations * samples_per_step(args), args.ramp)

    # run
    mode = get_mode(args.mode.split(",")[0], model.cfg.modes)
    before = read_held_out(model, tokenizer, mode, val_task)
    print0(f"before: {before}")
    summary = train(args, "fine-tuning", model, tokenizer, task, val_task, statistics_task, device)
    summary |= {"before": before, "after": read_held_out(model, tokenizer, mode, val_task)}
    if dist_info()[0] == 0:
        write_json(os.path.join(args.checkpoints, args.model_tag, "summary.json"), summary)
    json_line(summary)
    compute_cleanup()


if __name__ == "__main__":
    run_main(main)
