"""
Writes a checkpoint as a folder to share, and pushes it to the hub if asked.

    # for from_pretrained; --push uploads it, too
    python -m scripts.export --checkpoint=checkpoints/stage2 --out=export/nano
    python -m scripts.export --checkpoint=checkpoints/stage2 --out=export/mine --push=me/my-reader

    # half as large, for pages of any size: those that are not the model's own are read in windows
    # of print of 10 to 14 px and 130 to 400 characters, on which it was trained
    python -m scripts.export --checkpoint=checkpoints/stage2 --out=checkpoints/reader \
        --dtype=bfloat16 --windows=10-14,130-400 --command="bash speedrun.sh"

    # under DeepSeek-OCR's key names
    python -m scripts.export --checkpoint=checkpoints/stage2 --out=export/encoder --format=deepseek

The model card shows --command and the figures of --results, summary.json of scripts.vision_eval.
The folder's sha256.json, checked by every load, finds a damaged copy.
"""
import os

from nanochat import pretrained
from nanochat.checkpoint import WEIGHTS, sha256_of
from nanochat.common import ArgumentParser, json_line, print0, read_record, run_main
from nanochat.image_modes import get_mode
from nanochat.reader import NanoDeepseekOCR
from nanochat.windows import Known


def why_not_of(model, checkpoint, results, path):
    """What tells the results in `path` from results of this model; None if nothing does."""
    # A run folder keeps one summary, which may be of an earlier step than its last checkpoint.
    step = model.meta.get("step")
    if results.get("step") != step:
        return f"at step {results.get('step')}, this model is of step {step}"
    # Two runs may end at the same step. An evaluation notes the weights that it read with.
    settings = os.path.join(os.path.dirname(path), "settings.json")
    if os.path.exists(settings):
        weights = os.path.join(pretrained.find(checkpoint), WEIGHTS)
        if read_record(settings).get("weights") != sha256_of(weights):
            return "with other weights than this model's"
    return None


def main(argv=None):
    parser = ArgumentParser(__doc__)
    parser.add_argument("--checkpoint", default="checkpoints/stage2",
                        help="model_<step> folder, run folder, saved folder or hub name")
    parser.add_argument("--out", required=True, help="folder to write; must not exist")
    parser.add_argument("--format", default="nano", choices=["nano", "encoder", "deepseek"],
                        help="nano: everything, for from_pretrained; encoder: what stage 2 starts "
                             "from; deepseek: encoder and projector under DeepSeek-OCR's names")
    parser.add_argument("--results", default="",
                        help="summary.json of scripts.vision_eval for the model card, several with "
                             "commas; empty = eval/summary.json of the run, if there")
    parser.add_argument("--dtype", default="float32", choices=list(pretrained.SAVED_DTYPES),
                        help="of the parameters in the file; in memory they are float32 again")
    parser.add_argument("--windows", default="",
                        help="let the model read pages of any size in windows of print (px) and "
                             "characters that it knows, e.g. 10-14,130-400; empty = as it is")
    parser.add_argument("--command", default="",
                        help="how the model was made, for the model card")
    parser.add_argument("--push", default="",
                        help="hub repository (owner/name) to upload to, with HF_TOKEN from the "
                             "environment")
    parser.add_argument("--private", action="store_true",
                        help="create that repository as a private one; meta.json names the data "
                             "that the model was trained on")
    args = parser.parse_args(argv)
    given = parser.given(argv)
    for flag in ("dtype", "windows", "command", "results"):
        if flag in given and args.format != "nano":
            raise ValueError(f"--{flag} has no effect on --format={args.format}: leave it out")
    if args.private and not args.push:
        raise ValueError("--private has no effect without --push: leave it out")
    if os.path.exists(args.out):  # before the model is loaded, which takes its time
        raise FileExistsError(f"{args.out} exists: choose another --out")

    # -------------------------------------------------------------------------
    # Model, and what was measured of it
    print0(f"loading {args.checkpoint}")
    model = NanoDeepseekOCR.from_pretrained(args.checkpoint)
    if args.windows:
        mode = get_mode(model.meta.get("mode", model.cfg.modes[0]))
        if mode.tile:
            raise ValueError(f"--windows has no effect on a model of mode {mode.name}, which reads "
                             f"larger pages in tiles: leave it out")
        model.meta["windows"] = Known.parse(args.windows, mode.size).to_meta()
    results = {}
    own = os.path.join(args.checkpoint, "eval", "summary.json")
    paths = [own] if os.path.exists(own) else []
    for path in args.results.split(",") if args.results else paths:
        found = read_record(path)
        reason = why_not_of(model, args.checkpoint, found, path)
        if reason:
            print0(f"NOTE: {path} was measured {reason}: the card does not have its figures")
        else:
            results.update(found)

    # -------------------------------------------------------------------------
    # Write, push
    if args.format == "deepseek":
        pretrained.export_deepseek(model, args.out)
    elif args.format == "encoder":
        pretrained.save_encoder(model, args.out, args.push)
    else:
        model.save_pretrained(args.out, results, args.dtype, args.command, args.push)
    if args.push:
        print0(f"uploading {args.out} to {args.push}")
        try:
            pretrained.push(args.out, args.push, args.private)
        except (ValueError, OSError) as error:
            # The same command would find its own folder in the way.
            private = " --private" if args.private else ""
            raise OSError(f"{error}; {args.out} is whole, so what remains is: hf upload "
                          f"{args.push} {args.out}{private}") from error
    json_line({"exported": args.out, "format": args.format, "files": sorted(os.listdir(args.out)),
               "pushed": args.push or None})


if __name__ == "__main__":
    run_main(main)
