"""
Train the tokenizer on the training text of the embedded tasks. The held-out words are not in it.

    python -m scripts.tok_train
    python -m scripts.tok_train --vocab-size 300 --max-chars 200000 --out /tmp/tokenizer
"""

import argparse
import json
import os
import time

from nanochat.common import run_main
from nanochat.tokenizer import Tokenizer
from tasks.synthchat import SynthChat
from tasks.synthdoc import held_out_words, text_stream

CHAT_SHARE = 0.03  # of the characters; its few templates would otherwise take merges from the pages' words


def training_text(max_chars, seed):
    """Page texts and chat messages, max_chars characters in all."""
    left = int(max_chars * CHAT_SHARE)
    yield from text_stream("train", max_chars - left, seed)
    for conversation in SynthChat("train", max_chars, seed=f"text/{seed}"):
        for message in conversation["messages"]:
            if left <= 0:
                return
            yield message["content"]
            left -= len(message["content"])


def known_held_out_words(tokenizer):
    """Held-out words that are a token of their own: the model would pick them from a list instead of reading them."""
    tokens = {token.decode("utf-8", errors="replace").strip().lower() for token in tokenizer.ranks}
    return sorted(held_out_words() & tokens)


def main(argv=None):
    parser = argparse.ArgumentParser(description="Train the tokenizer")
    parser.add_argument("--vocab-size", type=int, default=270, help="tokens in all, special ones included")
    parser.add_argument("--max-chars", type=int, default=2_000_000, help="characters of text to train on")
    parser.add_argument("--out", default="checkpoints/tokenizer", help="folder for tokenizer.json")
    parser.add_argument("--overwrite", action="store_true", help="replace a tokenizer that is already there")
    parser.add_argument("--seed", type=int, default=0, help="seed of the training text")
    args = parser.parse_args(argv)
    if args.max_chars < 1:
        parser.error(f"--max-chars is {args.max_chars}: give 1 or more")
    path = os.path.join(args.out, "tokenizer.json")
    if os.path.exists(path) and not args.overwrite:
        parser.error(f"{path} exists and checkpoints may depend on it: choose another --out, or give --overwrite")

    t0 = time.time()
    tokenizer = Tokenizer.train(training_text(args.max_chars, args.seed), args.vocab_size)
    known = known_held_out_words(tokenizer)
    if known:
        parser.error(f"{len(known)} held-out words are single tokens ({', '.join(known[:5])}), which would spoil the "
                     f"heldout_words split: lower --vocab-size, now {args.vocab_size}")
    if tokenizer.get_vocab_size() < args.vocab_size:
        print(f"NOTE: only {tokenizer.get_vocab_size()} of {args.vocab_size} tokens: raise --max-chars for more")
    chars_per_token = {}
    for split in ("heldout", "heldout_words", "random_chars"):
        texts = list(text_stream(split, 100_000, args.seed))
        chars_per_token[split] = round(sum(map(len, texts)) / sum(len(tokenizer.encode(text)) for text in texts), 3)
        print(f"{split:>14}: {chars_per_token[split]:.3f} characters per token")
    tokenizer.save(args.out)
    print(f"saved {path} after {time.time() - t0:.1f} s")
    print(json.dumps({"tok_train": args.out, "vocab_size": tokenizer.get_vocab_size(), "chars": args.max_chars,
                      "chars_per_token": chars_per_token, "fingerprint": tokenizer.fingerprint()}))


if __name__ == "__main__":
    run_main(main)
