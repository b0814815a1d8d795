"""
BPE tokenizer: rustbpe trains it, tiktoken encodes with it. One file, tokenizer.json; nothing is pickled.

Special tokens sit at the end of the vocabulary and only the code below puts them into a sequence: text that happens to
spell one ("<|image|>") is encoded as plain characters.
"""

import base64
import hashlib
import json
import os

import tiktoken

IMAGE_TOKEN = "<|image|>"  # placeholder, one for each vision feature
SPECIAL_TOKENS = (
    "<|bos|>",  # opens every document
    "<|user_start|>", "<|user_end|>",
    "<|assistant_start|>", "<|assistant_end|>",
    "<|python_start|>", "<|python_end|>",  # the model calls the Python tool
    "<|output_start|>", "<|output_end|>",  # what the tool answered
    IMAGE_TOKEN,
)

# GPT-4's way to cut text before merging: a word takes the space or sign before it, digits go by ones and twos, signs
# keep together, line ends stand alone. Together the branches match every character, so nothing is lost.
PATTERN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


class Tokenizer:
    """
    ranks: list of bytes, the tokens in the order of their ids; the first 256 are the single bytes.
    special_tokens: names, which take the ids after the ranks.
    """

    def __init__(self, ranks, pattern=PATTERN, special_tokens=SPECIAL_TOKENS):
        self.ranks, self.pattern, self.special_tokens = list(ranks), pattern, tuple(special_tokens)
        self.special_ids = {name: len(self.ranks) + k for k, name in enumerate(self.special_tokens)}
        self.enc = tiktoken.Encoding("nano-deepseek-ocr", pat_str=pattern, special_tokens=self.special_ids,
                                     mergeable_ranks={token: i for i, token in enumerate(self.ranks)})

    @classmethod
    def train(cls, text_iterator, vocab_size):
        """A tokenizer of vocab_size tokens, special ones included; fewer if the text has too few pairs to merge."""
        smallest = 256 + len(SPECIAL_TOKENS)
        if vocab_size < smallest:
            raise ValueError(f"vocab_size {vocab_size} is too small for 256 bytes and {len(SPECIAL_TOKENS)} special "
                             f"tokens: give {smallest} or more")
        import rustbpe  # only training needs it
        trainer = rustbpe.Tokenizer()
        trainer.train_from_iterator(text_iterator, vocab_size - len(SPECIAL_TOKENS), pattern=PATTERN)
        pairs = sorted(trainer.get_mergeable_ranks(), key=lambda pair: pair[1])
        return cls([bytes(token) for token, _ in pairs])

    # --- file

    def to_json(self):
        ranks = [base64.b64encode(token).decode() for token in self.ranks]
        return json.dumps({"pattern": self.pattern, "special_tokens": self.special_tokens, "ranks": ranks}, indent=0)

    def fingerprint(self):
        """sha256 in hex of the saved content; a checkpoint records it, since ids mean nothing to another tokenizer."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def save(self, folder):
        """Writes folder/tokenizer.json, whole or not at all."""
        os.makedirs(folder, exist_ok=True)
        path = os.path.join(folder, "tokenizer.json")
        with open(path + ".tmp", "w", encoding="utf-8") as f:
            f.write(self.to_json())
        os.replace(path + ".tmp", path)

    @classmethod
    def load(cls, folder):
        path = os.path.join(folder, "tokenizer.json")
        if not os.path.exists(path):
            raise FileNotFoundError(f"no tokenizer at {path}: make one with python -m scripts.tok_train --out {folder}")
        try:
            with open(path, encoding="utf-8") as f:
                content = json.load(f)
            ranks = [base64.b64decode(token) for token in content["ranks"]]
            return cls(ranks, content["pattern"], content["special_tokens"])
        except (ValueError, KeyError, TypeError) as e:
            raise ValueError(f"{path} is not a tokenizer ({e!r}): make it again with python -m scripts.tok_train "
                             f"--out {folder} --overwrite") from e

    # --- text

    def get_vocab_size(self):
        return self.enc.n_vocab

    def get_bos_token_id(self):
        return self.special_ids["<|bos|>"]

    @property
    def image_token_id(self):
        return self.special_ids[IMAGE_TOKEN]

    def encode_special(self, name):
        if name not in self.special_ids:
            raise ValueError(f"unknown special token {name!r}: this tokenizer has {', '.join(self.special_ids)}")
        return self.special_ids[name]

    def encode(self, text):
        """ids of a text; special tokens spelled in it are plain text."""
        return self.enc.encode_ordinary(text)

    def decode(self, ids):
        return self.enc.decode(ids)

    def decode_bytes(self, ids):
        """As `decode`, before UTF-8: a token may hold a part of a character."""
        return self.enc.decode_bytes(ids)

    # --- conversations

    def render_conversation(self, conversation, image_positions=(), max_tokens=None):
        """
        (ids, mask) of a conversation (its format: nanochat/conversation.py), as
            <|bos|><|user_start|>...<|user_end|><|assistant_start|>...<|assistant_end|><|user_start|>...
        image_positions has one int for each image: how many <|image|> placeholders stand for it.
        mask is 1 on what the assistant has to say, its text and <|assistant_end|>, and 0 elsewhere.
        ValueError if the conversation is malformed or longer than max_tokens.
        """
        where = f"conversation {conversation.get('id', '?')!r}"
        messages = turns(conversation, where)
        check_images(messages, conversation.get("images", []), image_positions, where)
        positions = iter(image_positions)
        ids, mask = [self.get_bos_token_id()], [0]
        for role, parts in messages:
            start, end = self.encode_special(f"<|{role}_start|>"), self.encode_special(f"<|{role}_end|>")
            body = []
            for part in parts:
                is_image = part["type"] == "image"
                body += [self.image_token_id] * next(positions) if is_image else self.encode(part["text"])
            ids += [start, *body, end]
            mask += [0] + [int(role == "assistant")] * (len(body) + 1)
        if max_tokens is not None and len(ids) > max_tokens:
            raise ValueError(f"{where} has {len(ids)} tokens, over the limit of {max_tokens}: "
                             f"raise the context, or give fewer characters or a smaller image")
        return ids, mask

    def render_for_completion(self, conversation, image_positions=()):
        """ids up to and with the <|assistant_start|> that the model answers; a last assistant message is dropped."""
        messages = conversation["messages"]
        if messages and messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        ids, _ = self.render_conversation({**conversation, "messages": messages}, image_positions)
        return ids + [self.encode_special("<|assistant_start|>")]


def turns(conversation, where):
    """[(role, parts), ...] with every content as a list of parts and a system message put before the first user's."""
    messages = []
    for message in conversation["messages"]:
        parts = message["content"]
        parts = [{"type": "text", "text": parts}] if isinstance(parts, str) else list(parts)
        for part in parts:
            if part["type"] not in ("text", "image") or (part["type"] == "image" and message["role"] != "user"):
                raise ValueError(f"{where}: a {message['role']} message has a part of type {part['type']!r}: "
                                 f"text is allowed everywhere, image in user messages")
        messages.append((message["role"], parts))
    roles = [role for role, _ in messages]
    if roles[:2] == ["system", "user"]:
        (_, system), (_, user) = messages[:2]
        messages[:2] = [("user", [*system, {"type": "text", "text": "\n\n"}, *user])]
        roles = roles[1:]
    if not roles or roles != [("user", "assistant")[k % 2] for k in range(len(roles))]:
        raise ValueError(f"{where} has the roles {roles}: user and assistant must take turns, user first, "
                         f"after at most one system message")
    return messages


def check_images(messages, images, image_positions, where):
    """ValueError unless image parts, images and image_positions are equally many."""
    parts = sum(part["type"] == "image" for _, parts in messages for part in parts)
    if not parts == len(images) == len(image_positions):
        raise ValueError(f"{where} has {parts} image parts, {len(images)} images and {len(image_positions)} counts of "
                         f"image positions: they must be equally many")
    if any(n < 1 for n in image_positions):
        raise ValueError(f"{where} has image positions {list(image_positions)}: every image takes at least 1")
