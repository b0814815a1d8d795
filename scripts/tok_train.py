"""
Train the tokenizer on the training text of the embedded tasks. The held-out words are not in it.

    python -m scripts.tok_train
    python -m scripts.tok_train --vocab-size 300 --max-chars 200000 --out /tmp/tokenizer
"""
import json
import os
import time

from nanochat.common import ArgumentParser, natural, positive_int, run_main
from nanochat.tokenizer import Tokenizer, is_checkpoint
from tasks.synthchat import SynthChat
from tasks.synthdoc import text_stream
from tasks.words import held_out_words

# Of the characters. With more, the chat's few templates would take merges from the pages' words.
CHAT_SHARE = 0.03
MEASURED_SPLITS = ("heldout", "heldout_words", "random_chars")
MEASURED_CHARS = 100_000  # of each split


def training_text(max_chars, seed):
    """Yields page texts and chat messages, max_chars characters in all."""
    left = int(max_chars * CHAT_SHARE)
    yield from text_stream("train", max_chars - left, seed)
    for conversation in SynthChat("train", max_chars, seed=f"text/{seed}"):
        for message in conversation["messages"]:
            if left <= 0:
                return
            yield message["content"]
            left -= len(message["content"])


def known_held_out_words(tokenizer):
    """Held-out words that are one token: the model would pick them from a list, not read them."""
    tokens = {token.decode("utf-8", errors="replace").strip().lower() for token in tokenizer.ranks}
    return sorted(held_out_words() & tokens)


def measure_chars_per_token(tokenizer, split, seed):
    """Characters per token on pages of a split."""
    n_chars = 0
    n_tokens = 0
    for text in text_stream(split, MEASURED_CHARS, seed):
        n_chars += len(text)
        n_tokens += len(tokenizer.encode(text))
    return round(n_chars / n_tokens, 3)


def parse_args(argv):
    parser = ArgumentParser(__doc__)
    flag = parser.add_argument
    flag("--vocab-size", type=positive_int, default=270,
         help="tokens in all, special ones included")
    flag("--max-chars", type=positive_int, default=2_000_000, help="characters of text to train on")
    flag("--out", default="checkpoints/tokenizer", help="folder for tokenizer.json")
    flag("--overwrite", action="store_true", help="replace an existing tokenizer")
    flag("--seed", type=natural, default=0, help="seed of the training text")
    args = parser.parse_args(argv)

    path = os.path.join(args.out, "tokenizer.json")
    if is_checkpoint(args.out):
        parser.error(f"--out={args.out} is a checkpoint, whose weights need the tokenizer that "
                     f"they were trained with: choose another --out")
    if os.path.exists(path) and not args.overwrite:
        parser.error(
            f"{path} exists and checkpoints may depend on it: choose another --out, "
            "or give --overwrite"
        )
    return parser, args


def main(argv=None):
    parser, args = parse_args(argv)

    # Train
    t0 = time.time()
    print(f"training on {args.max_chars:,} characters")
    tokenizer = Tokenizer.train(training_text(args.max_chars, args.seed), args.vocab_size)
    vocab_size = tokenizer.get_vocab_size()
    if vocab_size < args.vocab_size:
        print(f"NOTE: only {vocab_size} of {args.vocab_size} tokens: raise --max-chars for more")

    # No training text has a held-out word, but merges of its parts could still spell one.
    known = known_held_out_words(tokenizer)
    if known:
        parser.error(
            f"{len(known)} held-out words are single tokens ({', '.join(known[:5])}), which would "
            f"contaminate the heldout_words split: lower --vocab-size, now {args.vocab_size}"
        )

    # Measure
    chars_per_token = {}
    for split in MEASURED_SPLITS:
        chars_per_token[split] = measure_chars_per_token(tokenizer, split, args.seed)
        print(f"{split:>14}: {chars_per_token[split]:.3f} characters per token")

    # Save
    tokenizer.save(args.out)
    path = os.path.join(args.out, "tokenizer.json")
    print(f"saved {path} after {time.time() - t0:.1f} s")
    record = {
        "tok_train": args.out,
        "vocab_size": vocab_size,
        "chars": args.max_chars,
        "chars_per_token": chars_per_token,
        "fingerprint": tokenizer.fingerprint(),
    }
    print(json.dumps(record))


if __name__ == "__main__":
    run_main(main)
