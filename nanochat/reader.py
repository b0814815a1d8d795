"""
Reading with a trained model: load it (from_pretrained), give it a picture (read), write it down to
share (save_pretrained). Also the flags that every script which reads has in common.

    model = NanoDeepseekOCR.from_pretrained("checkpoints/stage2", device="cuda")
    print(model.read("page.png"))
"""
from functools import partial

import torch

from nanochat import image_modes
from nanochat.checkpoint import load_model
from nanochat.common import choose_dtype, integer, print0, set_cuda_defaults
from nanochat.conversation import OCR_PROMPT, ocr_conversation, open_image
from nanochat.engine import Engine, NoRepeat
from nanochat.image_modes import get_mode
from nanochat.model import DeepseekOCR
from nanochat.pretrained import find, save


class NanoDeepseekOCR(DeepseekOCR):
    """A trained network with its tokenizer and meta: what a user loads and reads with."""
    def __init__(self, cfg):
        super().__init__(cfg)
        self.tokenizer = None
        self.meta = None  # the checkpoint's meta.json

    @classmethod
    def from_pretrained(cls, source, device="cpu", dtype=None):
        """
        -> model in eval mode, with its tokenizer and meta.

        source: a checkpoint, run or saved folder, or a hub name ("owner/name").
        dtype: compute dtype, "auto" (bfloat16 where the hardware has it), "bfloat16" or "float32";
        default auto on cuda, float32 elsewhere.
        """
        device = torch.device(device)
        # Without a GPU a model is mostly loaded to be exported or looked into, with full precision.
        if dtype is None:
            dtype = "auto" if device.type == "cuda" else "float32"
        model, _, _ = load_to_read(source, device, dtype, cls)
        return model

    def save_pretrained(self, folder, results=None):
        """
        Writes a new folder that from_pretrained reads. results: the summary of scripts.vision_eval,
        for the model card.
        """
        if any(p.dtype != torch.float32 for p in self.parameters()):
            raise ValueError("this model was loaded to compute in bfloat16, and saving it would "
                             "lose precision: load it with dtype=\"float32\" to save it")
        save(self, folder, results)

    def read(self, image, mode=None, prompt=None, max_new_tokens=None, no_repeat=None):
        """
        -> the text of a picture (a path or a PIL image), greedily.

        mode: name of an image mode, "auto", a Mode, or a function (width, height) -> Mode; default
        the one trained in. prompt: a question about the picture, in place of reading it.
        max_new_tokens: default as many as the decoder has positions left. no_repeat: an
        engine.NoRepeat. Raises conversation.BadSample, a ValueError, for what is no sound picture.
        """
        if self.tokenizer is None:
            raise ValueError("this model has no tokenizer to read with: load it with "
                             "NanoDeepseekOCR.from_pretrained, or set model.tokenizer")
        image = open_image(image, "model.read")
        # A model whose tokenizer was set by hand has no meta.
        meta = self.meta or {}
        mode = mode or meta.get("mode", self.cfg.modes[0])
        if isinstance(mode, str):
            mode = choose_mode(mode, self.cfg.modes)
        engine = Engine(self, self.tokenizer, mode, no_repeat)
        # Prompts begin with a line end, as all that the model was trained on do.
        prompt = "\n" + prompt if prompt else OCR_PROMPT
        conversation = ocr_conversation(image, "", "image", prompt)
        [result] = engine.generate([conversation], max_new_tokens)
        return result.text


def load_to_read(source, device, dtype, kind=DeepseekOCR, needed=()):
    """
    -> (model in eval mode on `device`, tokenizer, meta), set up to generate: attention settings,
    compute dtype, decoder weights in that dtype. source: as for from_pretrained; dtype: "auto",
    "bfloat16" or "float32"; needed: keys of meta that the caller uses.
    """
    if device.type == "cuda":
        set_cuda_defaults()
    model, tokenizer, meta = load_model(find(source), device, kind, needed)
    model.dtype = choose_dtype(device, dtype)
    # The layers cast their weights whenever they are used, which for the decoder is at every step.
    # Casting them once gives the same numbers and halves what a step reads from memory.
    for p in model.gpt.parameters():
        p.data = p.data.to(model.dtype)
    return model, tokenizer, meta


# -----------------------------------------------------------------------------
# For the scripts that read

# What they use of a checkpoint's meta.json.
NEEDED = {"mode": str, "step": int, "user_config": dict}


def choose_mode(name, supported):
    """The Mode of a name; for "auto" a function (width, height) -> Mode of `supported`, names."""
    if name == "auto":
        return partial(image_modes.auto_mode, supported)
    return get_mode(name)


def add_arguments(parser):
    """The flags that load_engine reads."""
    # Model
    parser.add_argument("--checkpoint", default="checkpoints/stage2",
                        help="model_<step> folder, run folder (its last checkpoint), or hub name")
    parser.add_argument("--mode", default="",
                        help="image mode, or auto; empty = the one the model was trained in")
    # Runtime
    parser.add_argument("--device-type", default="",
                        help="cuda, mps or cpu; empty = the best there is")
    parser.add_argument("--dtype", default="auto", help="compute dtype: auto, bfloat16, float32")
    # Generation
    parser.add_argument("--max-new-tokens", type=integer(1, off=-1), default=-1,
                        help="tokens a page may take; -1 = as many as there is room for, in an "
                             "evaluation half as many again as the longest truth")
    parser.add_argument("--no-repeat", default="",
                        help="N,WINDOW: no N tokens twice in a row within WINDOW, e.g. 30,90; "
                             "empty = off")


def load_engine(args, device):
    """-> (Engine, meta) for the flags of `add_arguments`."""
    folder = find(args.checkpoint)
    print0(f"loading {folder}")
    model, tokenizer, meta = load_to_read(folder, device, args.dtype, needed=NEEDED)
    limit = model.cfg.gpt.sequence_len - 1  # at least one position is the prompt's
    if args.max_new_tokens != -1 and not 1 <= args.max_new_tokens <= limit:
        raise ValueError(f"--max-new-tokens={args.max_new_tokens}: must be 1 to {limit}, "
                         f"the decoder's positions, or -1")
    mode = choose_mode(args.mode or meta["mode"], model.cfg.modes)
    no_repeat = NoRepeat.parse(args.no_repeat, tokenizer)
    return Engine(model, tokenizer, mode, no_repeat), meta
