"""
Reading with a trained model: load it (from_pretrained), give it a picture (read), write it down to
share (save_pretrained). Also the flags that every script which reads has in common.

    model = NanoDeepseekOCR.from_pretrained()                       # the one in checkpoints/reader
    model = NanoDeepseekOCR.from_pretrained("checkpoints/stage2", device="cuda")
    print(model.read("page.png"))

A model whose meta.json says so reads larger pictures in windows (nanochat/windows.py).
"""
import warnings
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import torch

from nanochat import image_modes
from nanochat.checkpoint import load_model
from nanochat.common import choose_dtype, gather, integer, print0, set_cuda_defaults
from nanochat.conversation import OCR_PROMPT, ocr_conversation, open_image
from nanochat.engine import Engine, NoRepeat, Result
from nanochat.image_modes import Mode, get_mode, upright_size
from nanochat.model import DeepseekOCR
from nanochat.pretrained import find, save
from nanochat.windows import Known, join, split

# Part of the repository, so it is found from any working directory.
READER = Path(__file__).resolve().parents[1] / "checkpoints" / "reader"
WINDOW_BATCH = 16  # windows that are generated together


class ReadingNote(UserWarning):
    """What a person should know of a page that was read, beside its text."""


# Python shows a text once per line of code. But the next page needs the same note as well.
warnings.simplefilter("always", ReadingNote)


class NanoDeepseekOCR(DeepseekOCR):
    """A trained network with its tokenizer and meta: what a user loads and reads with."""
    def __init__(self, cfg):
        super().__init__(cfg)
        self.tokenizer = None
        self.meta = None  # the checkpoint's meta.json

    @classmethod
    def from_pretrained(cls, source=None, device="cpu", dtype=None):
        """
        -> model in eval mode, with its tokenizer and meta.

        source: a checkpoint, run or saved folder, or a hub name ("owner/name"); None = the trained
        reader that is part of the repository. FileNotFoundError where there is none.
        dtype: compute dtype, "auto" (bfloat16 where the hardware has it), "bfloat16" or "float32";
        default auto on cuda, float32 elsewhere.
        """
        device = torch.device(device)
        # Without a GPU a model is mostly loaded to be exported or looked into, with full precision.
        if dtype is None:
            dtype = "auto" if device.type == "cuda" else "float32"
        model, tokenizer, meta = load_to_read(source or READER, device, dtype, cls)
        model.tokenizer = tokenizer
        model.meta = meta
        return model

    def save_pretrained(self, folder, results=None, dtype="float32", command=None, name=None):
        """
        Writes a new folder that from_pretrained reads. results: the summary of scripts.vision_eval,
        and command: how the model was made, both for the model card. dtype: of the parameters in
        the file, "float32" or "bfloat16", which halves it.
        """
        if any(p.dtype != torch.float32 for p in self.parameters()):
            raise ValueError("this model was loaded to compute in bfloat16, and saving it would "
                             "lose precision: load it with dtype=\"float32\" to save it")
        save(self, folder, results, dtype, command, name)

    def read(self, image, mode=None, prompt=None, max_new_tokens=None, no_repeat=None,
             windows="auto"):
        """
        -> the text of a picture (a path or a PIL image), greedily.

        mode: name of an image mode, "auto", a Mode, or a function (width, height) -> Mode; default
        the one trained in. prompt: a question about the picture, in place of reading it.
        max_new_tokens: default as many as the decoder has positions left. no_repeat: an
        engine.NoRepeat. windows: as the flag --windows. Warns (ReadingNote) of text that is
        left out, of low confidence, of loops, and of text that is cut by the limit. Raises
        conversation.BadSample, a ValueError, for an unreadable picture.
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
        engine = make_engine(self, self.tokenizer, mode, no_repeat, meta, windows)
        # Prompts begin with a line end, as all that the model was trained on do.
        prompt = "\n" + prompt if prompt else OCR_PROMPT
        conversation = ocr_conversation(image, "", "image", prompt)
        [result] = engine.generate([conversation], max_new_tokens)
        for note in getattr(result, "notes", []):  # what windows left out or could not decide
            warnings.warn(note, ReadingNote, stacklevel=2)
        if result.flags:
            doubts = ", ".join(result.flags)
            warnings.warn(f"look at this page, its text may be wrong: {doubts}", ReadingNote,
                          stacklevel=2)
        return result.text


def load_to_read(source, device, dtype, kind=DeepseekOCR, needed=()):
    """
    -> (model in eval mode on `device`, tokenizer, meta), set up to generate: attention settings,
    compute dtype, decoder weights in that dtype. source: as for from_pretrained; dtype: "auto",
    "bfloat16" or "float32"; needed: keys of meta that the caller uses.
    """
    if device.type == "cuda":
        set_cuda_defaults()
    model, tokenizer, meta = load_model(find_reader(source), device, kind, needed)
    model.dtype = choose_dtype(device, dtype)
    cast_decoder(model)
    return model, tokenizer, meta


def cast_decoder(model):
    """Casts the decoder's weights to the compute dtype once, for generation."""
    # The layers cast their weights whenever they are used, which for the decoder is at every step.
    # Casting them once gives the same numbers and halves what a step reads from memory.
    for p in model.gpt.parameters():
        p.data = p.data.to(model.dtype)


def find_reader(source):
    """As pretrained.find; of the reader that is part of the repository, it says how to get it."""
    if Path(source) == READER and not READER.is_dir():
        raise FileNotFoundError(
            f"no such folder {READER}: this copy of the repository comes without its reader. Get "
            f"it with git (git checkout -- checkpoints/reader), or name a checkpoint of your own "
            f"(bash speedrun.sh trains one)")
    return find(str(source))


# -----------------------------------------------------------------------------
# Reading in windows

@dataclass
class PageResult(Result):
    """The text of a page that was read in windows."""
    windows: list   # of (name, Result)
    notes: list     # what the rules left out or could not decide

    @property
    def flags(self):
        reasons = []
        for _, result in self.windows:
            for reason in result.flags:
                if reason not in reasons:
                    reasons.append(reason)
        return reasons


class WindowEngine(Engine):
    """
    An Engine that reads a page of another size than `known.size` in windows. Pages of that size,
    questions about a picture (prompts other than OCR_PROMPT) and chats are as for any Engine.
    """
    def __init__(self, model, tokenizer, mode, no_repeat, known):
        super().__init__(model, tokenizer, mode, no_repeat)
        self.known = known

    def split(self, conversation):
        """-> (Windows, notes) of a conversation, None if it is read as it is."""
        if len(conversation["images"]) != 1:
            return None
        [image] = conversation["images"]
        question = conversation["messages"][0]["content"][-1]
        has_known_size = upright_size(image) == (self.known.size, self.known.size)
        if has_known_size or question != {"type": "text", "text": OCR_PROMPT}:
            return None
        # Kept with the conversation, as an evaluation asks for them several times; and with the
        # picture, as copies of a conversation may have another.
        if conversation.get("windows_of") is not image:
            conversation["windows"] = split(image, self.known)
            conversation["windows_of"] = image
        return conversation["windows"]

    def parts(self, conversation):
        if self.split(conversation) is None:
            return [conversation]
        windows, _ = self.split(conversation)
        parts = []
        for number, window in enumerate(windows, start=1):
            name = f"{conversation['id']} window {number} of {len(windows)}"
            part = ocr_conversation(window.image, "", name)
            parts.append(part)
        return parts

    def generate(self, conversations, max_new_tokens, temperature=0.0, seed=0):
        parts_of = [self.parts(conversation) for conversation in conversations]
        all_parts = [part for parts in parts_of for part in parts]
        all_results = []
        for start in range(0, len(all_parts), WINDOW_BATCH):
            batch = all_parts[start:start + WINDOW_BATCH]
            all_results += super().generate(batch, max_new_tokens, temperature, seed)

        results = []
        remaining = iter(all_results)
        for conversation, parts in zip(conversations, parts_of):
            own = list(islice(remaining, len(parts)))
            if self.split(conversation) is None:
                results += own
            else:
                results.append(self.joined(conversation, own))
        return results

    def joined(self, conversation, results):
        """PageResult of the Results of a page's windows, or of the first of them."""
        windows, notes = self.split(conversation)
        text = join(windows[:len(results)], [result.text for result in results])
        tokens = sum(result.tokens for result in results)
        finished = all(result.finished for result in results)
        # The mean over all tokens, as that of a page in one piece; 0 where there is nothing.
        total = sum(result.confidence * result.tokens for result in results)
        named = []
        for number, (window, result) in enumerate(zip(windows, results), start=1):
            left, top, right, bottom = window.place
            name = f"window {number} of {len(windows)} (x {left}-{right}, y {top}-{bottom})"
            named.append((name, result))
        return PageResult(text, tokens, finished, total / max(tokens, 1), named, notes)

    def stream(self, conversation, max_new_tokens, temperature=0.0, seed=0):
        if self.split(conversation) is None:
            yield from super().stream(conversation, max_new_tokens, temperature, seed)
            return
        windows, _ = self.split(conversation)
        results = []
        for window, part in zip(windows, self.parts(conversation)):
            before = window.before
            for piece, result in super().stream(part, max_new_tokens, temperature, seed):
                yield before + piece, self.joined(conversation, [*results, result])
                before = ""
            results.append(result)
        if not windows:
            yield "", self.joined(conversation, [])


def known_to(meta, mode, windows):
    """
    The Known of a reader, None if it does not read in windows. meta: of its checkpoint; mode: as
    for Engine; windows: "auto" (as meta says), "no", or the print and characters that it knows.
    ValueError if windows are asked for in a mode that has none.
    """
    if windows == "no":
        return None
    is_plain = isinstance(mode, Mode) and not mode.tile
    if windows == "auto":
        return Known.from_meta(meta, mode.size) if is_plain else None
    if not is_plain:
        raise ValueError(f"--windows={windows} needs an image mode of one size: leave --mode=auto "
                         f"and modes with tiles out")
    return Known.parse(windows, mode.size)


def make_engine(model, tokenizer, mode, no_repeat, meta, windows):
    """An Engine, or a WindowEngine for a reader that reads in windows; arguments as theirs."""
    known = known_to(meta, mode, windows)
    if known is None:
        return Engine(model, tokenizer, mode, no_repeat)
    return WindowEngine(model, tokenizer, mode, no_repeat, known)


# -----------------------------------------------------------------------------
# For the scripts that read

# What they use of a checkpoint's meta.json.
NEEDED = {"mode": str, "step": int, "user_config": dict}


def choose_mode(name, supported):
    """The Mode of a name; for "auto" a function (width, height) -> Mode of `supported`, names."""
    if name == "auto":
        return partial(image_modes.auto_mode, supported)
    return get_mode(name)


def add_arguments(parser, checkpoint="checkpoints/stage2"):
    """The flags that load_engine reads. checkpoint: the default one."""
    # Model
    parser.add_argument("--checkpoint", default=checkpoint,
                        help="model_<step> folder, run folder (its last checkpoint), or hub name")
    parser.add_argument("--mode", default="",
                        help="image mode, or auto; empty = the one the model was trained in")
    parser.add_argument("--windows", default="auto",
                        help="auto: pages of another size than the reader's are read in windows if "
                             "its meta.json says so; no: never; or the print in px and the "
                             "characters that it knows, e.g. 10-14,130-400")
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
    """
    -> (Engine, meta) for the flags of `add_arguments`. The engine's `folder` is the checkpoint that
    was loaded, also where a run folder has a newer one by now.
    """
    # One for all ranks: a run that still trains may save a checkpoint while they look.
    folder = gather(str(find_reader(args.checkpoint)))[0]
    print0(f"loading {folder}")
    model, tokenizer, meta = load_to_read(folder, device, args.dtype, needed=NEEDED)
    limit = model.cfg.gpt.sequence_len - 1  # at least one position is the prompt's
    if args.max_new_tokens != -1 and not 1 <= args.max_new_tokens <= limit:
        raise ValueError(f"--max-new-tokens={args.max_new_tokens}: must be 1 to {limit}, "
                         f"the decoder's positions, or -1")
    mode = choose_mode(args.mode or meta["mode"], model.cfg.modes)
    no_repeat = NoRepeat.parse(args.no_repeat, tokenizer)
    engine = make_engine(model, tokenizer, mode, no_repeat, meta, args.windows)
    engine.folder = folder
    return engine, meta
