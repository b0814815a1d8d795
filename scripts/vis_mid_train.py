"""
Stage 2: the encoder of stage 1 meets a fresh decoder. SAM and compressor are frozen; CLIP, projector and GPT are trained on
pages and text-only chat mixed (paper, section 3.5.2).

    python -m scripts.vis_mid_train                                       # one process, after scripts.vis_tok_train
    torchrun --standalone --nproc_per_node=8 -m scripts.vis_mid_train --optimizer=adamw --lr=3e-5 --schedule=step --run=stage2
    python -m scripts.vis_mid_train --encoder=checkpoints/try --num-iterations=20 --chars=8-12 --model-tag=try2   # seconds, on a CPU

Sizes come from the encoder's checkpoint. Writes checkpoints/<model-tag>/model_<step>/.
"""
from nanochat import checkpoint as ckpt
from nanochat import pretrained
from nanochat.common import compute_cleanup, compute_init, json_line, print0, read_json, run_main
from nanochat.mixture import Mixture
from nanochat.loop import samples_per_step, train, training_arguments
from nanochat.model import DeepseekOCR
from tasks.synthchat import SynthChat
from tasks.registry import training_sets

INHERITED = ("tokenizer", "mode", "chars", "faces", "min_px", "random_share", "max_seq_len")  # from stage 1 unless given here


def main(argv=None):
    parser = training_arguments(__doc__.split("\n")[1], model_tag="stage2", num_iterations=950, ramp=4800, eval_every=150,
                                save_every=150)
    parser.add_argument("--encoder", default="checkpoints/stage1", help="deepencoder_<step> folder, stage-1 run folder or hub name")
    parser.add_argument("--gpt", default="", help="nanochat checkpoint the decoder starts from, hub name or folder; empty = random weights")
    parser.add_argument("--text-share", type=int, default=10, help="built-in text-only chat in a hundred samples, beside --data")
    inherited_defaults = {name: parser.get_default(name) for name in INHERITED}
    parser.set_defaults(**dict.fromkeys(INHERITED))
    args = parser.parse_args(argv)
    device = compute_init(args.device_type)

    # what stage 1 was, and what of it holds here
    encoder_dir = pretrained.fetch(args.encoder, "deepencoder")
    cfg = ckpt.ModelConfig.from_dict(read_json(f"{encoder_dir}/config.json"))
    stage1 = read_json(f"{encoder_dir}/meta.json")
    for name in INHERITED:
        theirs, ours = stage1["user_config"].get(name, inherited_defaults[name]), getattr(args, name)
        if ours is None:
            setattr(args, name, theirs)
            print0(f"inherited --{name.replace('_', '-')}={theirs}")
        elif ours != theirs:
            print0(f"NOTE: --{name.replace('_', '-')}={ours} overrides stage 1's {theirs}")

    # tokenizer and model
    tokenizer = pretrained.choose_decoder(cfg, args)
    if tokenizer.fingerprint() != stage1["tokenizer"]:
        print0("NOTE: another tokenizer than stage 1's; the decoder is fresh, so this is allowed")
    model = DeepseekOCR(cfg).init_weights(args.seed + 1)  # another seed: the decoder is not stage 1's initial one
    ckpt.load_encoder(encoder_dir, model)
    if args.gpt and not ckpt.resuming(args):
        pretrained.load_nanochat(model.gpt, args.gpt)
    model.to(device)
    model.encoder.freeze_sam()

    # data
    if not 0 <= args.text_share < 100:
        raise ValueError(f"--text-share={args.text_share}: percent of the samples, 0 to 99")
    samples = args.num_iterations * samples_per_step(args)
    task, val_task, statistics_task = training_sets(args, cfg.sam.image_size, samples + 100, args.ramp)
    if args.text_share:
        chat = SynthChat("train", samples + 100, seed=args.seed)
        task = Mixture([(task, 100 - args.text_share), (chat, args.text_share)])

    # run
    summary = train(args, "stage 2", model, tokenizer, task, val_task, statistics_task, device)
    json_line(summary)
    compute_cleanup()


if __name__ == "__main__":
    run_main(main)
