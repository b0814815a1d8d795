"""
A small text-only chat task, mixed into stage 2 so that the decoder keeps following plain
instructions.

Same seeding as SynthDoc: item i is a function of (split, seed, i). Every question belongs to one
split by the hash of its text, so no held-out question is ever trained on, and no text has a
held-out word. Messages are under 100 characters.
"""
import random

from nanochat.common import stable_hash
from nanochat.conversation import Task
from tasks.words import train_words

SPLITS = ("train", "heldout")  # as SynthDoc's, of which the others make no sense for a chat


def ask(rng):
    """One (question, answer) pair of strings."""
    # Few words: a message stays short, and the answer can be computed while reading the question.
    words = rng.sample(train_words(), rng.randint(2, 4))
    text = " ".join(words)
    word = words[0]
    a = rng.randint(1, 99)
    b = rng.randint(1, 99)
    # Ten kinds of question, each as likely as the next.
    return rng.choice([
        (f"Repeat: {text}", text),
        (f"Spell {word}.", " ".join(word)),
        (f"In capitals: {text}", text.upper()),
        (f"How many words? {text}", str(len(words))),
        (f"How many letters? {word}", str(len(word))),
        (f"What is {a} + {b}?", str(a + b)),
        (f"Reverse the order: {text}", " ".join(reversed(words))),
        (f"First word: {text}", word),
        (f"Last word: {text}", words[-1]),
        (f"Sort by letter: {text}", " ".join(sorted(words))),
    ])


def is_held_out(question):
    """A tenth of all questions, by hash."""
    return stable_hash(question) % 10 == 0


class SynthChat(Task):
    """`size` conversations of one question and its answer, without pictures."""
    def __init__(self, split, size, seed=0):
        if split not in SPLITS:
            raise ValueError(f"unknown split {split!r}: choose one of {', '.join(SPLITS)}")
        if size < 1:
            raise ValueError(f"size {size} counts conversations: give size >= 1")
        self.split = split
        self.size = size
        self.seed = seed

    def __len__(self):
        return self.size

    def __getitem__(self, i):
        self.check_index(i)
        id = f"synthchat/{self.split}/{self.seed}/{i}"
        rng = random.Random(id)
        # A question of the other split is thrown away: on average 1.1 are drawn for train, 10 for
        # heldout.
        question, answer = ask(rng)
        while is_held_out(question) != (self.split == "heldout"):
            question, answer = ask(rng)
        messages = [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
        return {"messages": messages, "images": [], "id": id}
