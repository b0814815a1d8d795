"""
Generation: a batch of conversations with images in, texts out. Images are encoded once; the prompt fills the KV cache; then
one token per row and step, until the row ends or its budget is spent. Finished rows leave the batch. On CUDA a step is a graph
that is replayed, since launching its kernels one by one takes longer than reading the weights.
"""
import codecs
import math
import re
from dataclasses import dataclass
from functools import lru_cache

import torch
from PIL import ImageOps

from nanochat.batch import collate
from nanochat.gpt import KVCache
from nanochat.image_modes import plan, preprocess
from nanochat.metrics import repetition
from nanochat.tokenizer import SPECIAL_TOKENS

LOW_CONFIDENCE = math.log(2 / 3)  # nats per token, mean of the tokens chosen; pages below it scored 0.6 1-NED or less with a nano model


@dataclass
class Result:
    text: str
    tokens: int           # generated, the end token included
    finished: bool        # ended by itself, not by the limit
    confidence: float     # mean log-probability (nats) of the generated tokens

    @property
    def flags(self):
        """Reasons to look at this page: "loops", "low confidence", "cut" (by the limit)."""
        found = {"loops": repetition(self.text), "low confidence": self.confidence < LOW_CONFIDENCE, "cut": not self.finished}
        return [name for name, is_so in found.items() if is_so]


@dataclass(frozen=True)
class NoRepeat:
    """
    No n-gram of generated tokens again while its first stands within the last `window` of them; tokens of the whitelist (table
    tags) are always allowed. DeepSeek-OCR's rule; its settings are 30,90 for pictures and 20,50 for PDFs. Only loops with a
    period of at most window - n + 1 tokens are broken. The prompt is not scanned, hence no image placeholder either.
    """
    n: int
    window: int
    whitelist: frozenset = frozenset()

    def __post_init__(self):
        if not 2 <= self.n <= self.window:
            raise ValueError(f"no-repeat n-gram {self.n},{self.window}: needs 2 <= n <= window, e.g. 30,90")

    @classmethod
    def parse(cls, text, tokenizer):
        """"30,90" -> NoRepeat whose whitelist is the tokens of <td> and </td>; "" -> None."""
        if text and not re.fullmatch(r"\d+,\d+", text):
            raise ValueError(f"--no-repeat={text}: give N,WINDOW in tokens, e.g. 30,90")
        return cls(*map(int, text.split(",")), frozenset(tokenizer.encode("<td>") + tokenizer.encode("</td>"))) if text else None

    def banned(self, ids):
        """Tokens that must not follow `ids`, the tokens of one row so far."""
        k, last = self.n - 1, ids[-1:]
        return [ids[i + k] for i in range(max(0, len(ids) - self.window), len(ids) - k)
                if ids[i + k - 1:i + k] == last and ids[i:i + k] == ids[-k:] and ids[i + k] not in self.whitelist]


GRAPH_STEPS = 16  # replayed at a time before the host looks at the tokens
GRAPH_ROOM = 128  # positions the cache grows by: each time, the step is captured anew


@lru_cache(None)
def warming_stream():
    return torch.cuda.Stream()  # one for all captures: libraries keep memory for every stream


def captured(step, state):
    """step(), which works in place on tensors that stay where they are, as a CUDA graph; state: the tensors that it changes."""
    before, warming = [t.clone() for t in state], warming_stream()
    warming.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warming):
        step()  # libraries take their memory now
    torch.cuda.current_stream().wait_stream(warming)
    for t, old in zip(state, before):
        t.copy_(old)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # the loader pins memory meanwhile, in a thread of its own
        step()
    return graph.replay


class Engine:
    """mode: a Mode, or a function (width, height) in px of the upright picture -> Mode; a conversation's own key "mode" overrides it."""
    def __init__(self, model, tokenizer, mode, no_repeat=None):
        self.model, self.tokenizer, self.mode, self.no_repeat = model, tokenizer, mode, no_repeat
        self.graphs = model.device.type == "cuda"  # off, a step is launched kernel by kernel
        self.end = tokenizer.encode_special("<|assistant_end|>")
        # never generated: placeholders and every special token but the end
        self.banned = [i for i in map(tokenizer.encode_special, SPECIAL_TOKENS) if i != self.end]

    def plans(self, conversation):
        """One image_modes.Plan per image of the conversation."""
        mode = conversation.get("mode", self.mode)
        sizes = [ImageOps.exif_transpose(image).size for image in conversation["images"]]
        return [plan(mode(*size) if callable(mode) else mode, *size, self.model.cfg.token_stride) for size in sizes]

    def prompt_batch(self, conversations):
        """-> (Batch on the model's device, prompt length of each row)."""
        samples = []
        for c in conversations:
            images = [preprocess(image, p.mode, self.model.cfg.token_stride) for image, p in zip(c["images"], self.plans(c))]
            ids = self.tokenizer.render_for_completion(c, [p.positions for p, _, _ in images])
            samples.append((ids + [0], [0] * (len(ids) + 1), images, 0))  # collate shifts by one; nothing is supervised
        return collate(samples).to(self.model.device), [len(s[0]) - 1 for s in samples]

    def generate(self, conversations, max_new_tokens, temperature=0.0, seed=0):
        """-> one Result per conversation. temperature 0 = greedy; max_new_tokens None = up to the decoder's last position."""
        tokens, logprobs = [[] for _ in conversations], [0.0] * len(conversations)
        for step in self.decode(conversations, max_new_tokens, temperature, seed):
            for row, token, logprob in step:
                tokens[row].append(token)
                logprobs[row] += logprob
        results = []
        for ids, logprob in zip(tokens, logprobs):
            finished = ids[-1] == self.end
            results.append(Result(self.tokenizer.decode(ids[:-1] if finished else ids), len(ids), finished, logprob / len(ids)))
        return results

    def generate_each(self, conversations, max_new_tokens, temperature=0.0):
        """As `generate`, but a conversation that is refused (too long) gets its ValueError, and the others their Result."""
        try:
            return self.generate(conversations, max_new_tokens, temperature) if conversations else []
        except ValueError as error:
            if len(conversations) == 1:
                return [error]
            return [result for c in conversations for result in self.generate_each([c], max_new_tokens, temperature)]

    def stream(self, conversation, max_new_tokens, temperature=0.0, seed=0):
        """Yields (new piece of text, Result so far) as tokens come; a character cut by a token boundary waits for its rest."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        text, total = "", 0.0
        for n, [(_, token, logprob)] in enumerate(self.decode([conversation], max_new_tokens, temperature, seed), 1):
            finished = token == self.end
            piece = decoder.decode(b"" if finished else self.tokenizer.decode_bytes([token]), final=finished)
            text, total = text + piece, total + logprob
            yield piece, Result(text, n, finished, total / n)
        if rest := decoder.decode(b"", final=True):
            yield rest, Result(text + rest, n, finished, total / n)

    @torch.inference_mode()
    def decode(self, conversations, max_new_tokens, temperature, seed):
        """Yields for each step [(row, its new token, log-probability in nats), ...] of the rows that still go on."""
        model, gpt, device = self.model, self.model.gpt, self.model.device
        if model.training:
            raise ValueError("the model is in training mode: call model.eval() first")
        batch, lengths = self.prompt_batch(conversations)
        if max_new_tokens is None:
            max_new_tokens = gpt.cfg.sequence_len - max(lengths)
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens {max_new_tokens}: must be at least 1, beside a prompt of {max(lengths)} positions")
        rng = torch.Generator(device).manual_seed(seed) if temperature > 0 else None
        banned, greedy = torch.tensor(self.banned, device=device), rng is None and not self.no_repeat
        replayed = self.graphs and greedy
        longest = max(lengths)
        cache = KVCache(gpt.cfg, len(lengths), longest + max_new_tokens, device, model.dtype, **({"room": GRAPH_ROOM} if replayed else {}))
        cache.reserve(longest)
        hidden = gpt(model.embed(batch), cache=cache)
        position = torch.tensor(lengths, device=device)  # where each row's next token goes
        rows, said = list(range(len(lengths))), [[] for _ in lengths]  # which conversation each live row is; its tokens

        def choose(logits):
            logits.index_fill_(1, banned, float("-inf"))
            if self.no_repeat:
                for live, row in enumerate(rows):
                    logits[live, self.no_repeat.banned(said[row])] = float("-inf")
            choice = logits.argmax(-1) if rng is None else \
                torch.multinomial((logits / temperature).softmax(-1), 1, generator=rng)[:, 0]
            return choice, logits.gather(1, choice[:, None])[:, 0] - logits.logsumexp(-1)

        def step():  # in place
            x = gpt.transformer.wte(choice)[:, None].to(model.dtype)
            logits = gpt.logits(gpt(x, cache=cache, positions=position[:, None])[:, 0])
            for t, new in zip((choice, logprob, position), (*choose(logits), position + 1)):
                t.copy_(new)

        choice, logprob = choose(gpt.logits(hidden[torch.arange(len(rows), device=device), position - 1]))
        news, done, over, advance = [(choice, logprob)], 0, set(), None  # over: live rows that have ended
        while True:
            for tokens, logprobs in zip(*(torch.stack(part).tolist() for part in zip(*news))):
                told = [(row, token, lp) for live, (row, token, lp) in enumerate(zip(rows, tokens, logprobs)) if live not in over]
                if told:
                    yield told
                for row, token, _ in told:
                    said[row].append(token)
                over.update(live for live, token in enumerate(tokens) if token == self.end)
            done += len(news)
            if len(over) == len(rows) or done == max_new_tokens:
                return
            n = min(GRAPH_STEPS if replayed else 1, max_new_tokens - done)
            moved = cache.reserve(longest + done - 1 + n)
            if over and (moved or not replayed):  # another number of rows is another graph
                keep = [live for live in range(len(rows)) if live not in over]
                rows, over, keep, advance = [rows[live] for live in keep], set(), torch.tensor(keep, device=device), None
                choice, logprob, position = choice[keep], logprob[keep], position[keep]
                cache.keep_rows(keep)
            if moved or advance is None:
                advance = captured(step, (choice, logprob, position)) if replayed else step
            news = []
            for _ in range(n):
                advance()
                news.append((choice.clone(), logprob.clone()))
