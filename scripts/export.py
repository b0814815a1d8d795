"""
Writes a checkpoint as a folder to share, and pushes it to the hub if asked.

    # for from_pretrained
    python -m scripts.export --checkpoint=checkpoints/stage2 --out=export/nano
    python -m scripts.export --checkpoint=checkpoints/stage2 --out=export/nano --push=me/my-reader

    # under DeepSeek-OCR's key names
    python -m scripts.export --checkpoint=checkpoints/stage2 --out=export/encoder --format=deepseek

The model card shows the figures of --results, a summary.json of scripts.vision_eval.
"""
import os

from nanochat import pretrained
from nanochat.common import ArgumentParser, json_line, print0, read_record, run_main
from nanochat.reader import NanoDeepseekOCR


def main(argv=None):
    parser = ArgumentParser(__doc__)
    parser.add_argument("--checkpoint", default="checkpoints/stage2",
                        help="model_<step> folder, run folder, saved folder or hub name")
    parser.add_argument("--out", required=True, help="folder to write; must not exist")
    parser.add_argument("--format", default="nano", choices=["nano", "encoder", "deepseek"],
                        help="nano: everything, for from_pretrained; encoder: what stage 2 starts "
                             "from; deepseek: encoder and projector under DeepSeek-OCR's names")
    parser.add_argument("--results", default="",
                        help="summary.json of scripts.vision_eval for the model card; empty = "
                             "eval/summary.json of the run, if there")
    parser.add_argument("--push", default="",
                        help="hub repository (owner/name) to upload to, with HF_TOKEN from the "
                             "environment")
    args = parser.parse_args(argv)
    if os.path.exists(args.out):  # before the model is loaded, which takes its time
        raise FileExistsError(f"{args.out} exists: choose another --out")

    # -------------------------------------------------------------------------
    # Model, and what was measured of it
    print0(f"loading {args.checkpoint}")
    model = NanoDeepseekOCR.from_pretrained(args.checkpoint)
    results = None
    results_path = args.results or os.path.join(args.checkpoint, "eval", "summary.json")
    if args.results or os.path.exists(results_path):
        results = read_record(results_path)
        # A run folder keeps one summary, which may be of an earlier step than its last checkpoint.
        step = model.meta.get("step")
        if results.get("step") != step:
            print0(f"NOTE: {results_path} was measured at step {results.get('step')}, this model "
                   f"is of step {step}: the card has no figures")
            results = None

    # -------------------------------------------------------------------------
    # Write, push
    if args.format == "deepseek":
        pretrained.export_deepseek(model, args.out)
    elif args.format == "encoder":
        pretrained.save_encoder(model, args.out)
    else:
        model.save_pretrained(args.out, results)
    if args.push:
        print0(f"uploading {args.out} to {args.push}")
        pretrained.push(args.out, args.push)
    json_line({"exported": args.out, "format": args.format, "files": sorted(os.listdir(args.out)),
               "pushed": args.push or None})


if __name__ == "__main__":
    run_main(main)
