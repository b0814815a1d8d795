"""
Reads picture files with a trained checkpoint and prints the text.

    python -m scripts.vision_sample page.png photo.jpg --checkpoint=checkpoints/stage2
"""
import argparse

from PIL import Image, UnidentifiedImageError

from nanochat.checkpoint import load_model
from nanochat.common import choose_dtype, compute_init, run_main
from nanochat.engine import Engine
from nanochat.image_modes import get_mode
from tasks.common import ocr_conversation


def open_image(path):
    """PIL RGB image; an unreadable file is a ValueError that names it."""
    try:
        with Image.open(path) as image:
            image.load()
            return image
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError) as e:
        if isinstance(e, FileNotFoundError):
            raise
        raise ValueError(f"{path} is not a readable picture: {e}") from e


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[1], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("images", nargs="+", help="picture files")
    parser.add_argument("--checkpoint", default="checkpoints/stage2", help="model_<step> folder, or a run folder (then its last)")
    parser.add_argument("--mode", default="", help="image mode; empty = the one the model was trained in")
    parser.add_argument("--device-type", default="", help="cuda, mps or cpu; empty = the best there is")
    parser.add_argument("--dtype", default="auto", help="compute dtype: auto, bfloat16, float32")
    parser.add_argument("--max-new-tokens", type=int, default=200, help="tokens a page may take")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 = greedy")
    args = parser.parse_args(argv)

    pages = [(path, open_image(path)) for path in args.images]  # before the model: a bad path fails at once
    device = compute_init(args.device_type)
    model, tokenizer, meta = load_model(args.checkpoint, device)
    model.dtype = choose_dtype(device, args.dtype)
    engine = Engine(model, tokenizer, get_mode(args.mode or meta["mode"], model.cfg.modes))
    for path, image in pages:
        result, = engine.generate([ocr_conversation(image, "", path)], args.max_new_tokens, args.temperature)
        print(f"{path} (confidence {result.confidence:.2f} nats/token{'' if result.finished else ', cut at --max-new-tokens'})\n{result.text}", flush=True)


if __name__ == "__main__":
    run_main(main)
