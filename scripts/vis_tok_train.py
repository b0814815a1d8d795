"""
Stage 1: DeepEncoder, projector and a decoder learn to read together, by next-token prediction (paper, section 3.5.1).

    python -m scripts.vis_tok_train                                       # one process, nano
    torchrun --standalone --nproc_per_node=8 -m scripts.vis_tok_train --preset=base --run=stage1
    python -m scripts.vis_tok_train --preset=tiny --num-iterations=20 --chars=8-12 --model-tag=try   # seconds, on a CPU

Writes checkpoints/<model-tag>/model_<step>/ and, at the end, deepencoder_<step>/: the encoder that stage 2 starts from.
"""
from nanochat.common import compute_cleanup, compute_init, json_line, run_main
from nanochat.config import PRESETS
from nanochat.loop import samples_per_step, train, training_arguments
from nanochat.model import NanoDeepseekOCR
from nanochat.tokenizer import Tokenizer
from tasks.training import training_sets


def main(argv=None):
    parser = training_arguments(__doc__.split("\n")[1], model_tag="stage1", num_iterations=1100, chars="31-41", ramp=12800,
                                eval_every=150, save_every=150)
    parser.add_argument("--preset", default="nano", choices=sorted(PRESETS), help="sizes of the model (nanochat/config.py)")
    parser.add_argument("--standardize", default="", choices=["", "none", "channel", "position"],
                        help="compressor output over the batch; empty = the preset's")
    args = parser.parse_args(argv)
    device = compute_init(args.device_type)

    # tokenizer and model
    tokenizer = Tokenizer.load(args.tokenizer)
    cfg = PRESETS[args.preset]()
    cfg.standardize = args.standardize or cfg.standardize
    cfg.gpt.vocab_size, cfg.image_token_id = tokenizer.get_vocab_size(), tokenizer.image_token_id
    model = NanoDeepseekOCR(cfg).init_weights(args.seed).to(device)

    # data
    pages = args.num_iterations * samples_per_step(args)
    task, val_task, statistics_task = training_sets(args, cfg.sam.image_size, pages, args.ramp)

    # run
    summary = train(args, "stage 1", model, tokenizer, task, val_task, statistics_task, device)
    json_line(summary)
    compute_cleanup()


if __name__ == "__main__":
    run_main(main)
