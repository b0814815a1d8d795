"""
BPE tokenizer: rustbpe trains it, tiktoken encodes with it. One file, tokenizer.json; no pickles.

Special tokens are at the end of the vocabulary, and only the code below puts them into a sequence:
text that happens to spell one ("<|image|>") is encoded as plain characters.
"""
import base64
import hashlib
import json
import os

import tiktoken

from nanochat.common import replace_file

IMAGE_TOKEN = "<|image|>"  # placeholder, one for each vision feature
SPECIAL_TOKENS = (
    "<|bos|>",  # opens every document
    "<|user_start|>", "<|user_end|>",
    "<|assistant_start|>", "<|assistant_end|>",
    "<|python_start|>", "<|python_end|>",  # the model calls the Python tool
    "<|output_start|>", "<|output_end|>",  # what the tool answered
    IMAGE_TOKEN,
)

# How GPT-4 splits text before merging: a word takes the space or sign before it, signs stay
# together, line ends stand alone. Digits go by ones and twos as in nanochat, since a small
# vocabulary has no room for all numbers of three. Together the branches match every character,
# so nothing is lost.
PATTERN = (
    r"[^\r\n\p{L}\p{N}]?\p{L}+"
    r"|\p{N}{1,2}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+"
    r"|\s+(?!\S)"
    r"|\s+"
)


def is_checkpoint(folder):
    """Whether there are weights in a folder, which mean nothing without their own tokenizer."""
    return os.path.exists(os.path.join(folder, "model.safetensors"))


class Tokenizer:
    """
    ranks: list of bytes, the tokens in the order of their ids; the first 256 are the single bytes.
    special_tokens: names, which take the ids after the ranks.
    """

    def __init__(self, ranks, pattern=PATTERN, special_tokens=SPECIAL_TOKENS):
        self.ranks = list(ranks)
        self.pattern = pattern
        self.special_tokens = tuple(special_tokens)
        self.special_ids = {}
        for k, name in enumerate(self.special_tokens):
            self.special_ids[name] = len(self.ranks) + k
        self.enc = tiktoken.Encoding(
            "nano-deepseek-ocr",
            pat_str=pattern,
            mergeable_ranks={token: i for i, token in enumerate(self.ranks)},
            special_tokens=self.special_ids,
        )

    @classmethod
    def train(cls, text_iterator, vocab_size):
        """A tokenizer of vocab_size tokens, special ones included; fewer if the text has too few
        pairs to merge."""
        smallest = 256 + len(SPECIAL_TOKENS)
        if vocab_size < smallest:
            raise ValueError(f"vocab_size {vocab_size} is too small for 256 bytes and "
                             f"{len(SPECIAL_TOKENS)} special tokens: give {smallest} or more")
        import rustbpe  # only training needs it
        trainer = rustbpe.Tokenizer()
        n_ranks = vocab_size - len(SPECIAL_TOKENS)
        trainer.train_from_iterator(text_iterator, n_ranks, pattern=PATTERN)
        pairs = sorted(trainer.get_mergeable_ranks(), key=lambda pair: pair[1])
        return cls([bytes(token) for token, _ in pairs])

    # -------------------------------------------------------------------------
    # File

    def to_json(self):
        ranks = [base64.b64encode(token).decode() for token in self.ranks]
        content = {
            "pattern": self.pattern,
            "special_tokens": self.special_tokens,
            "ranks": ranks,
        }
        return json.dumps(content, indent=0)

    def fingerprint(self):
        """sha256 in hex of the file's content. Checkpoints record it: ids mean nothing to another
        tokenizer."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def save(self, folder):
        """Writes folder/tokenizer.json, whole or not at all."""
        os.makedirs(folder, exist_ok=True)
        path = os.path.join(folder, "tokenizer.json")
        replace_file(path, self.to_json())

    @classmethod
    def load(cls, folder):
        path = os.path.join(folder, "tokenizer.json")
        # To make a new one is no answer where weights depend on the old one.
        belongs_to_weights = is_checkpoint(folder)
        if not os.path.exists(path):
            advice = f"make one with python -m scripts.tok_train --out {folder}"
            if belongs_to_weights:
                advice = "the weights beside it need their own, copy it from another checkpoint"
            raise FileNotFoundError(f"no tokenizer at {path}: {advice}")
        try:
            with open(path, encoding="utf-8") as f:
                content = json.load(f)
            ranks = [base64.b64decode(token) for token in content["ranks"]]
            return cls(ranks, content["pattern"], content["special_tokens"])
        except (ValueError, KeyError, TypeError, RecursionError) as e:
            advice = f"make it again with python -m scripts.tok_train --out {folder} --overwrite"
            if belongs_to_weights:
                advice = "the weights beside it need it, copy it from another checkpoint of the run"
            raise ValueError(f"{path} is not a tokenizer ({e!r}): {advice}") from e

    # -------------------------------------------------------------------------
    # Text

    def get_vocab_size(self):
        return self.enc.n_vocab

    def get_bos_token_id(self):
        return self.special_ids["<|bos|>"]

    @property
    def image_token_id(self):
        return self.special_ids[IMAGE_TOKEN]

    def encode_special(self, name):
        if name not in self.special_ids:
            raise ValueError(f"unknown special token {name!r}: "
                             f"this tokenizer has {', '.join(self.special_ids)}")
        return self.special_ids[name]

    def encode(self, text):
        """ids of a text; special tokens spelled in it are plain text."""
        return self.enc.encode_ordinary(text)

    def decode(self, ids):
        return self.enc.decode(ids)

    def decode_bytes(self, ids):
        """Like `decode`, before UTF-8: a token may hold a part of a character."""
        return self.enc.decode_bytes(ids)

    # -------------------------------------------------------------------------
    # Conversations

    def render_conversation(self, conversation, image_positions=()):
        """
        Conversation (its format: nanochat/conversation.py) -> (ids, mask), equally long, as
            <|bos|><|user_start|>...<|user_end|><|assistant_start|>...<|assistant_end|>...
        image_positions: for each image, how many <|image|> placeholders stand for it.
        mask: 1 on what the assistant has to say, its text and <|assistant_end|>, else 0.
        ValueError if the conversation is malformed.
        """
        where = f"conversation {conversation.get('id', '?')!r}"
        messages = turns(conversation, where)
        check_images(messages, conversation.get("images", []), image_positions, where)

        ids = [self.get_bos_token_id()]
        mask = [0]
        positions = iter(image_positions)
        for role, parts in messages:
            # The start token is part of the prompt, at generation too, so it is never supervised.
            ids.append(self.encode_special(f"<|{role}_start|>"))
            mask.append(0)

            body = []
            for part in parts:
                if part["type"] == "image":
                    body += [self.image_token_id] * next(positions)
                else:
                    body += self.encode(part["text"])
            body.append(self.encode_special(f"<|{role}_end|>"))

            supervised = 1 if role == "assistant" else 0
            ids += body
            mask += [supervised] * len(body)
        return ids, mask

    def render_for_completion(self, conversation, image_positions=()):
        """
        ids of a prompt, up to and including the <|assistant_start|> that the model continues.
        If the last message is the assistant's, it is left out.
        """
        messages = conversation["messages"]
        if messages and messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        prompt = {**conversation, "messages": messages}
        ids, _ = self.render_conversation(prompt, image_positions)
        return ids + [self.encode_special("<|assistant_start|>")]


def turns(conversation, where):
    """
    -> [(role, parts), ...], user and assistant by turns: every content is a list of parts, and a
    system message is merged into the first user message. ValueError if that is not possible.
    """
    messages = []
    for message in conversation["messages"]:
        messages.append((message["role"], parts_of(message, where)))

    # There is no special token for the system: nanochat puts its text before the user's, too.
    roles = [role for role, _ in messages]
    if roles[:2] == ["system", "user"]:
        _, system = messages[0]
        _, user = messages[1]
        blank_line = {"type": "text", "text": "\n\n"}
        messages = [("user", [*system, blank_line, *user]), *messages[2:]]
        roles = roles[1:]

    expected = ["user", "assistant"] * len(roles)
    if not roles or roles != expected[:len(roles)]:
        raise ValueError(f"{where} has the roles {roles}: user and assistant must take turns, "
                         f"user first, after at most one system message")
    return messages


def parts_of(message, where):
    """The content of a message as a list of parts; ValueError for a part that is not allowed."""
    role = message["role"]
    content = message["content"]
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    parts = list(content)
    for part in parts:
        allowed = part["type"] == "text" or (part["type"] == "image" and role == "user")
        if not allowed:
            raise ValueError(f"{where}: a {role} message has a part of type {part['type']!r}: "
                             f"text is allowed everywhere, image in user messages")
    return parts


def check_images(messages, images, image_positions, where):
    """ValueError unless image parts, images and image_positions are equally many."""
    n_parts = 0
    for _, parts in messages:
        n_parts += sum(part["type"] == "image" for part in parts)
    if not n_parts == len(images) == len(image_positions):
        raise ValueError(f"{where} has {n_parts} image parts, {len(images)} images and "
                         f"{len(image_positions)} counts of image positions: "
                         f"they must be equally many")
    if any(n < 1 for n in image_positions):
        raise ValueError(f"{where} has image positions {list(image_positions)}: "
                         f"every image takes at least 1")
