"""
Stage 1: DeepEncoder, projector and a decoder learn to read together, by next-token prediction (paper, section 3.5.1).

    python -m scripts.vis_tok_train                                       # one process, nano
    torchrun --standalone --nproc_per_node=8 -m scripts.vis_tok_train --preset=base --run=stage1
    python -m scripts.vis_tok_train --preset=tiny --num-iterations=20 --chars=8-12 --model-tag=try   # seconds, on a CPU

Writes checkpoints/<model-tag>/model_<step>/ and, at the end, deepencoder_<step>/: the encoder that stage 2 starts from.
"""
from nanochat import checkpoint as ckpt
from nanochat import pretrained
from nanochat.common import compute_cleanup, compute_init, json_line, run_main
from nanochat.config import PRESETS
from nanochat.loop import samples_per_step, train, training_arguments
from nanochat.model import DeepseekOCR
from tasks.registry import training_sets


def main(argv=None):
    parser = training_arguments(__doc__.split("\n")[1], model_tag="stage1", num_iterations=1000, chars="31-41x4,16-30x1", ramp=12800,
                                eval_every=150, save_every=150)
    parser.add_argument("--preset", default="nano", choices=sorted(PRESETS), help="sizes of the model (nanochat/config.py)")
    parser.add_argument("--standardize", default="", choices=["", "none", "channel", "position"],
                        help="compressor output over the batch; empty = the preset's")
    for part, example in (("sam", pretrained.SAM), ("clip", pretrained.CLIP), ("encoder", pretrained.DEEPSEEK), ("gpt", "nanochat-students/base-d20")):
        parser.add_argument(f"--{part}", default="", help=f"published weights to start from, hub name or folder, e.g. {example}; empty = random")
    parser.add_argument("--freeze", default="", help="for little data: parts kept as they are loaded, of sam-core (all but the compressor), clip, gpt; with commas")
    args = parser.parse_args(argv)
    device = compute_init(args.device_type)

    # tokenizer and model
    cfg = PRESETS[args.preset]()
    cfg.standardize = args.standardize or cfg.standardize
    tokenizer = pretrained.choose_decoder(cfg, args)
    model = DeepseekOCR(cfg).init_weights(args.seed)
    if not ckpt.resuming(args):
        for source, load in ((args.sam, pretrained.load_sam), (args.clip, pretrained.load_clip), (args.encoder, pretrained.load_deepseek)):
            if source:
                load(model, source)
        if args.gpt:
            pretrained.load_nanochat(model.gpt, args.gpt)
    model.freeze(args.freeze.split(",") if args.freeze else [])
    model.to(device)

    # data
    pages = args.num_iterations * samples_per_step(args)
    task, val_task, statistics_task = training_sets(args, cfg.sam.image_size, pages, args.ramp)

    # run
    summary = train(args, "stage 1", model, tokenizer, task, val_task, statistics_task, device)
    json_line(summary)
    compute_cleanup()


if __name__ == "__main__":
    run_main(main)
