"""
Reading with a trained model: load it (from_pretrained), give it a picture (read), write it down to share (save_pretrained); and the
flags that every script that reads has.
"""
from functools import partial

from nanochat import image_modes
from nanochat.checkpoint import load_model
from nanochat.common import choose_dtype
from nanochat.conversation import OCR_PROMPT, ocr_conversation
from nanochat.engine import Engine, NoRepeat
from nanochat.image_modes import get_mode
from nanochat.model import DeepseekOCR
from nanochat.pretrained import fetch, save


class NanoDeepseekOCR(DeepseekOCR):
    """A trained network with its tokenizer and meta: what a user loads and reads with."""
    def __init__(self, cfg):
        super().__init__(cfg)
        self.tokenizer = self.meta = None

    @classmethod
    def from_pretrained(cls, source, device="cpu"):
        """A checkpoint, run or saved folder, or a hub name ("owner/name") -> model in eval mode, with its tokenizer and meta."""
        return load_model(fetch(source), device, cls)[0]

    def save_pretrained(self, folder, results=None):
        """Writes a new folder that from_pretrained reads; `results`, the summary of scripts.vision_eval, goes into its model card."""
        save(self, folder, results)

    def read(self, image, mode=None, prompt=None, max_new_tokens=None, no_repeat=None):
        """
        Text of a PIL image, greedily. mode: name, "auto" or Mode, default the one trained in; prompt: a question in place of reading
        the page; max_new_tokens: default as many as the decoder has positions left; no_repeat: an engine.NoRepeat.
        """
        if self.tokenizer is None:
            raise ValueError("this model has no tokenizer to read with: load it by NanoDeepseekOCR.from_pretrained, or set model.tokenizer")
        mode = mode or (self.meta or {}).get("mode", self.cfg.modes[0])
        engine = Engine(self, self.tokenizer, choose_mode(mode, self.cfg.modes) if isinstance(mode, str) else mode, no_repeat)
        conversation = ocr_conversation(image, "", "image", "\n" + prompt if prompt else OCR_PROMPT)
        return engine.generate([conversation], max_new_tokens)[0].text


def choose_mode(name, supported):
    """The Mode of a name; for "auto" a function (width, height) -> Mode."""
    return partial(image_modes.auto_mode, supported) if name == "auto" else get_mode(name, supported)


def add_arguments(parser):
    parser.add_argument("--checkpoint", default="checkpoints/stage2", help="model_<step> folder, or a run folder (then its last)")
    parser.add_argument("--mode", default="", help="image mode, or auto; empty = the one the model was trained in")
    parser.add_argument("--device-type", default="", help="cuda, mps or cpu; empty = the best there is")
    parser.add_argument("--dtype", default="auto", help="compute dtype: auto, bfloat16, float32")
    parser.add_argument("--max-new-tokens", type=int, default=200, help="tokens a page may take")
    parser.add_argument("--no-repeat", default="", help="N,WINDOW: no N tokens twice in a row within WINDOW, e.g. 30,90; empty = off")


def load_engine(args, device):
    """-> (Engine, meta) for the flags of `add_arguments`."""
    model, tokenizer, meta = load_model(fetch(args.checkpoint), device)
    if not 1 <= args.max_new_tokens < model.cfg.gpt.sequence_len:
        raise ValueError(f"--max-new-tokens={args.max_new_tokens}: must be 1 to {model.cfg.gpt.sequence_len - 1}, the decoder's positions")
    model.dtype = choose_dtype(device, args.dtype)
    for p in model.gpt.parameters():  # cast once: they would be at each step, to the same numbers
        p.data = p.data.to(model.dtype)
    mode = choose_mode(args.mode or meta["mode"], model.cfg.modes)
    return Engine(model, tokenizer, mode, NoRepeat.parse(args.no_repeat, tokenizer)), meta
