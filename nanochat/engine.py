"""
Generation: a batch of conversations with images in, texts out.

1. Images are encoded once, and the prompt fills the KV cache.
2. Every step gives each row one more token, until the row ends by itself or its budget is spent.
   Finished rows leave the batch.

On CUDA a step is captured as a graph and replayed, because launching its kernels one by one takes
longer than reading the weights from memory does.

Shapes: B rows in the batch, L of them live (still generating), V entries in the vocabulary.
"""
import codecs
import math
import re
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from PIL import ImageOps

from nanochat.batch import Sample, collate
from nanochat.gpt import FixedKVCache, KVCache
from nanochat.image_modes import plan, preprocess
from nanochat.metrics import repetition
from nanochat.tokenizer import SPECIAL_TOKENS

# Nats per token, mean over a page. With a nano model, pages below this had a 1-NED of 0.6 or less.
LOW_CONFIDENCE = math.log(2 / 3)

# -----------------------------------------------------------------------------
# What comes out


@dataclass
class Result:
    """One generated text."""
    text: str
    tokens: int           # generated, the end token included
    finished: bool        # ended by itself, not by the limit
    confidence: float     # mean log-probability (nats) of the generated tokens

    @property
    def flags(self):
        """Reasons to look at this page: "loops", "low confidence", "cut" (by the limit)."""
        reasons = []
        if repetition(self.text):
            reasons.append("loops")
        if self.confidence < LOW_CONFIDENCE:
            reasons.append("low confidence")
        if not self.finished:
            reasons.append("cut")
        return reasons


# -----------------------------------------------------------------------------
# Which tokens may come next


@dataclass(frozen=True)
class NoRepeat:
    """
    DeepSeek-OCR's rule against loops: an n-gram of generated tokens may not come again if its
    earlier copy began within the last `window` tokens. Its settings are 30,90 for pictures and
    20,50 for PDFs.

    Tokens of the whitelist (table tags) are always allowed. The prompt is not scanned. Only loops
    with a period of at most window - n + 1 tokens are broken.
    """
    n: int
    window: int
    whitelist: frozenset = frozenset()

    def __post_init__(self):
        if not 2 <= self.n <= self.window:
            raise ValueError(
                f"no-repeat n-gram {self.n},{self.window}: needs 2 <= n <= window, e.g. 30,90")

    @classmethod
    def parse(cls, text, tokenizer):
        """"30,90" -> NoRepeat whose whitelist is the tokens of <td> and </td>; "" -> None."""
        if not text:
            return None
        if not re.fullmatch(r"\d+,\d+", text):
            raise ValueError(f"--no-repeat={text}: give N,WINDOW in tokens, e.g. 30,90")
        n, window = text.split(",")
        table_tags = tokenizer.encode("<td>") + tokenizer.encode("</td>")
        return cls(int(n), int(window), frozenset(table_tags))

    def banned(self, ids):
        """Tokens that must not follow `ids`, the tokens generated so far in one row."""
        k = self.n - 1
        tail = ids[-k:]  # with one more token it would be an n-gram
        banned = []
        for start in range(max(0, len(ids) - self.window), len(ids) - k):
            # One token is compared before the whole slice: this runs for every row at every step.
            if ids[start + k - 1] != tail[-1] or ids[start:start + k] != tail:
                continue
            follower = ids[start + k]
            if follower not in self.whitelist:
                banned.append(follower)
        return banned


class TokenChoice:
    """How the next token is chosen from logits: greedily, or by sampling if temperature > 0."""
    def __init__(self, banned, no_repeat, temperature, seed, device):
        self.banned_ids = list(banned)
        self.banned = torch.tensor(banned, device=device)
        self.no_repeat = no_repeat
        self.temperature = temperature
        self.generator = None
        if temperature > 0:
            self.generator = torch.Generator(device).manual_seed(seed)

    @property
    def on_device(self):
        """
        Whether a choice can be part of a CUDA graph. Not with no-repeat, for which the host looks
        at the text after every step, and not when sampling, which draws from a generator.
        """
        return self.generator is None and not self.no_repeat

    def __call__(self, logits, texts):
        """
        logits (L, V), changed in place; texts: the tokens so far of each of the L rows.
        -> (token (L,), its log-probability in nats (L,)).
        """
        logits.index_fill_(1, self.banned, float("-inf"))
        if self.no_repeat:
            for row, text in enumerate(texts):
                logits[row, self.no_repeat.banned(text)] = float("-inf")
        if self.generator is None:
            token = logits.argmax(-1)
        else:
            probabilities = (logits / self.temperature).softmax(-1)
            token = torch.multinomial(probabilities, 1, generator=self.generator)[:, 0]
        # Confidence is always that of the model itself, whatever the temperature.
        logprob = logits.gather(1, token[:, None])[:, 0] - logits.logsumexp(-1)
        return token, logprob


# -----------------------------------------------------------------------------
# CUDA graphs

GRAPH_STEPS = 16  # steps replayed before the host looks at their tokens: each look is a GPU sync
GRAPH_ROOM = 128  # positions by which the cache grows at least; every size needs a capture


@lru_cache(None)
def warming_stream():
    """One stream for the warm-up of all captures: libraries keep a workspace for every stream."""
    return torch.cuda.Stream()


def captured(step, state):
    """
    step() as a CUDA graph -> function that replays it. A replay works on the memory addresses of
    the capture, so step must work in place on static tensors; `state` are those that it changes.
    """
    before = [t.clone() for t in state]
    # A first, ordinary run lets libraries allocate their workspaces, which a capture must not do.
    # PyTorch asks for a side stream for it.
    warming = warming_stream()
    warming.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warming):
        step()
    torch.cuda.current_stream().wait_stream(warming)
    # That run was a real step: undo it. The KV cache needs no undoing, because the first replay
    # writes the same keys and values to the same places.
    for t, old in zip(state, before):
        t.copy_(old)
    graph = torch.cuda.CUDAGraph()
    # The default mode would fail when any other thread calls CUDA during the capture, and the data
    # loader pins memory in a thread of its own.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        step()
    return graph.replay


class GraphMemory:
    """
    What the graphs of decoding steps read and write, for batches of up to `rows` rows and `length`
    positions, and the graphs themselves. Kept from batch to batch: a capture takes much longer than
    a step, and a batch needs one for every size of its cache.
    """
    def __init__(self, model, choose, rows, length):
        device = model.device
        self.choose = choose  # the graphs read its tensors, too
        self.rows = rows
        self.length = length
        self.cache = FixedKVCache(model.gpt.cfg, rows, length, device, model.dtype, GRAPH_ROOM)
        self.token = torch.zeros(rows, dtype=torch.int64, device=device)
        self.logprob = torch.zeros(rows, device=device)
        self.position = torch.zeros(rows, dtype=torch.int64, device=device)
        self.replays = {}  # {(rows, reserved positions): function that replays a step}

    def holds(self, rows, length):
        return rows <= self.rows and length <= self.length


def written(memory, values):
    """Writes values (L,) to the beginning of `memory`. -> that part of it."""
    view = memory[:len(values)]
    view.copy_(values)
    return view


# -----------------------------------------------------------------------------
# The rows of a batch


@dataclass
class Row:
    """One live row, as the host knows it."""
    conversation: int                            # its number in the batch that was asked for
    tokens: list = field(default_factory=list)   # generated so far
    finished: bool = False                       # it has generated the end token


class LiveRows:
    """
    The rows that are still being generated. On the host there is a `Row` for each; on the device
    their KV cache and three tensors (L,) in the same order: the newest `token` of each row, its
    `logprob` (nats), and the `position` at which the next step puts it.

    `step` changes the three in place, so that it can be captured as a CUDA graph. With graphs all
    of them are views of a GraphMemory.
    """
    def __init__(self, model, choose, end, lengths, max_new_tokens, memory=None):
        """
        choose: a TokenChoice; end: id of the token that ends a row; lengths: positions that each
        row's prompt takes; memory: a GraphMemory, to replay steps as CUDA graphs.
        """
        self.model = model
        self.choose = choose
        self.end = end
        self.memory = memory
        self.replay = None   # replays one step, once it is captured
        self.steps = 0       # tokens that every row has been given so far
        self.lengths = lengths
        self.longest = max(lengths)
        self.rows = [Row(number) for number in range(len(lengths))]
        if memory is None:
            positions = self.longest + max_new_tokens
            self.cache = KVCache(model.gpt.cfg, len(lengths), positions, model.device, model.dtype)
        else:
            self.cache = memory.cache
            self.cache.look_at(len(lengths), reserved=0)

    def prefill(self, batch):
        """The prompts go through the decoder, and every row gets its first token."""
        self.cache.reserve(self.longest)
        hidden = self.model.gpt(self.model.embed(batch), cache=self.cache)    # (L, T, C)
        every_row = torch.arange(len(self.rows), device=hidden.device)
        # Prompts differ in length: what a row generates overwrites the padding of its own prompt.
        position = torch.tensor(self.lengths, device=hidden.device)
        last = hidden[every_row, position - 1]                                # (L, C)
        self.place(*self.choose_next(last), position)
        self.steps = 1

    def place(self, token, logprob, position):
        """Puts the rows' three tensors where a step expects them."""
        if self.memory is not None:
            token = written(self.memory.token, token)
            logprob = written(self.memory.logprob, logprob)
            position = written(self.memory.position, position)
        self.token = token
        self.logprob = logprob
        self.position = position

    def newest(self):
        """The newest token of each row and its logprob, on the host: two lists of L numbers."""
        return self.token.tolist(), self.logprob.tolist()

    def choose_next(self, hidden):
        """Last hidden state of each row (L, C) -> (token (L,), logprob (L,))."""
        texts = [row.tokens for row in self.rows]
        return self.choose(self.model.gpt.logits(hidden), texts)

    def step(self):
        """One more token for every row, in place."""
        gpt = self.model.gpt
        x = gpt.transformer.wte(self.token)[:, None].to(self.model.dtype)            # (L, 1, C)
        hidden = gpt(x, cache=self.cache, positions=self.position[:, None])[:, 0]    # (L, C)
        token, logprob = self.choose_next(hidden)
        self.token.copy_(token)
        self.logprob.copy_(logprob)
        self.position.add_(1)

    def advance(self, n):
        """n steps. -> their tokens and logprobs on the host: two lists of n lists of L numbers."""
        tokens = []
        logprobs = []
        for _ in range(n):
            if self.replay:
                self.replay()
            else:
                self.step()
            tokens.append(self.token.clone())  # the next step overwrites it
            logprobs.append(self.logprob.clone())
        self.steps += n
        # Only here does the host wait for the GPU, once for all n steps.
        return torch.stack(tokens).tolist(), torch.stack(logprobs).tolist()

    def record(self, tokens, logprobs):
        """
        Adds one step's tokens to their rows. -> [(conversation, token, logprob), ...].
        A finished row that is still in the batch goes on computing; what it says is ignored.
        """
        news = []
        for row, token, logprob in zip(self.rows, tokens, logprobs):
            if row.finished:
                continue
            row.tokens.append(token)
            row.finished = token == self.end
            news.append((row.conversation, token, logprob))
        return news

    def all_finished(self):
        return all(row.finished for row in self.rows)

    def prepare(self, n):
        """Before n more steps: makes room in the cache, drops finished rows, finds the graph."""
        # The newest token, number `steps` of its row, is not in the cache yet: it is the first one
        # that the next step writes.
        grown = self.cache.reserve(self.longest + self.steps - 1 + n)
        if self.memory is None:
            self.drop_finished(least=1)
            return
        # Another number of rows needs another graph, and a capture costs many steps. So with graphs
        # rows are dropped only when the cache has grown, and half of them at a time.
        if grown:
            live = sum(not row.finished for row in self.rows)
            self.drop_finished(least=1 << (live - 1).bit_length())
        size = (len(self.rows), self.cache.reserved)
        if size not in self.memory.replays:
            state = (self.token, self.logprob, self.position)
            self.memory.replays[size] = captured(self.step, state)
        self.replay = self.memory.replays[size]

    def drop_finished(self, least):
        """Drops finished rows, but keeps `least` rows if there are as many."""
        finished = [i for i, row in enumerate(self.rows) if row.finished]
        spare = max(0, len(self.rows) - least)
        dropped = set(finished[:spare])
        if not dropped:
            return
        keep = [i for i in range(len(self.rows)) if i not in dropped]
        self.rows = [self.rows[i] for i in keep]
        keep = torch.tensor(keep, device=self.token.device)
        self.cache.keep_rows(keep)
        self.place(self.token[keep], self.logprob[keep], self.position[keep])


class Engine:
    """
    Generates with a model (in eval mode) and its tokenizer.

    mode: a Mode, or a function (width, height) in px of the upright picture -> Mode; the key "mode"
    of a conversation overrides it. no_repeat: a NoRepeat, or None.
    """
    def __init__(self, model, tokenizer, mode, no_repeat=None):
        self.model = model
        self.tokenizer = tokenizer
        self.mode = mode
        self.no_repeat = no_repeat
        self.graphs = model.device.type == "cuda"  # off: kernels are launched one by one
        # A GraphMemory, of the last batch for the next one. Its graphs read the weights where they
        # are now: make an Engine after the model has been moved or cast.
        self.memory = None
        self.end = tokenizer.encode_special("<|assistant_end|>")
        # Never generated: image placeholders, every other special token but the end, and ids that
        # the tokenizer lacks, since a vocabulary may be padded to a round number of rows.
        special = [tokenizer.encode_special(name) for name in SPECIAL_TOKENS]
        self.banned = [token for token in special if token != self.end]
        self.banned += range(tokenizer.get_vocab_size(), model.cfg.gpt.vocab_size)

    # --- prompts

    def parts(self, conversation):
        """The conversations generated for this one: itself, or what a subclass splits it into."""
        return [conversation]

    def plans(self, conversation):
        """One image_modes.Plan per image of the conversation."""
        mode = conversation.get("mode", self.mode)
        plans = []
        for image in conversation["images"]:
            width, height = ImageOps.exif_transpose(image).size
            image_mode = mode(width, height) if callable(mode) else mode
            plans.append(plan(image_mode, width, height, self.model.cfg.layout))
        return plans

    def prompt_sample(self, conversation):
        """The prompt of one conversation, ready for `collate`."""
        images = []
        for image, p in zip(conversation["images"], self.plans(conversation)):
            images.append(preprocess(image, p.mode, self.model.cfg.layout))
        positions = [p.positions for p, _, _ in images]
        ids = self.tokenizer.render_for_completion(conversation, positions)
        # collate makes pairs of a token and the next one, so a last id, never seen by the model, is
        # added for it to cut off. Nothing is supervised.
        ids = ids + [0]
        return Sample(ids, mask=[0] * len(ids), images=images)

    def prompt_batch(self, conversations):
        """-> (Batch on the host, prompt length of each row in positions)."""
        samples = [self.prompt_sample(c) for c in conversations]
        lengths = [len(sample.ids) - 1 for sample in samples]
        return collate(samples), lengths

    # --- generation

    def generate(self, conversations, max_new_tokens, temperature=0.0, seed=0):
        """
        -> one Result per conversation. temperature 0 = greedy. max_new_tokens None = as many as the
        decoder has positions left. ValueError if prompt and new tokens do not fit into the decoder.
        """
        tokens = [[] for _ in conversations]
        logprobs = [0.0] * len(conversations)
        for step in self.decode(conversations, max_new_tokens, temperature, seed):
            for number, token, logprob in step:
                tokens[number].append(token)
                logprobs[number] += logprob
        return [self.result(ids, total) for ids, total in zip(tokens, logprobs)]

    def result(self, ids, logprob):
        """Result of the generated `ids` whose log-probabilities sum to `logprob` nats."""
        finished = ids[-1] == self.end
        text = self.tokenizer.decode(ids[:-1] if finished else ids)
        return Result(text, len(ids), finished, logprob / len(ids))

    def generate_each(self, conversations, max_new_tokens, temperature=0.0):
        """
        As `generate`, but a conversation that is refused (too long) gets its ValueError in the
        place of a Result, and the others are generated nevertheless.
        """
        if not conversations:
            return []
        try:
            return self.generate(conversations, max_new_tokens, temperature)
        except ValueError as error:
            if len(conversations) == 1:
                return [error]
        # One of them cannot be generated and the error does not say which: try each alone.
        results = []
        for conversation in conversations:
            results += self.generate_each([conversation], max_new_tokens, temperature)
        return results

    def stream(self, conversation, max_new_tokens, temperature=0.0, seed=0):
        """
        Yields (new piece of text, Result so far) as tokens come. A token may end inside a
        character, which then comes with the token that completes it.
        """
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        text = ""
        total = 0.0   # log-probability of the whole text, nats
        tokens = 0
        finished = False
        for step in self.decode([conversation], max_new_tokens, temperature, seed):
            [(_, token, logprob)] = step  # the only row
            tokens += 1
            total += logprob
            finished = token == self.end
            new_bytes = b"" if finished else self.tokenizer.decode_bytes([token])
            piece = decoder.decode(new_bytes, final=finished)
            text += piece
            yield piece, Result(text, tokens, finished, total / tokens)
        # Cut by the limit inside a character: it is shown as U+FFFD, as `generate` has it.
        rest = decoder.decode(b"", final=True)
        if rest:
            yield rest, Result(text + rest, tokens, finished, total / tokens)

    @torch.inference_mode()
    def decode(self, conversations, max_new_tokens, temperature, seed):
        """
        Yields for each step [(number of the conversation, new token, log-probability in nats), ...]
        of the rows that have not finished. Arguments as for `generate`.

        Rows do not influence each other, except when sampling: they share one random generator, so
        what a row draws depends on the rest of its batch.
        """
        if self.model.training:
            raise ValueError("the model is in training mode: call model.eval() first")
        batch, lengths = self.prompt_batch(conversations)
        if max_new_tokens is None:
            max_new_tokens = self.model.gpt.cfg.sequence_len - max(lengths)
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens {max_new_tokens}: must be at least 1, "
                             f"beside a prompt of {max(lengths)} positions")
        choose = TokenChoice(self.banned, self.no_repeat, temperature, seed, self.model.device)
        if not (self.graphs and choose.on_device):
            yield from self.steps(batch, lengths, max_new_tokens, choose)
            return
        memory = self.take_memory(choose, len(lengths), max(lengths) + max_new_tokens)
        try:
            yield from self.steps(batch, lengths, max_new_tokens, memory.choose, memory)
        finally:
            self.memory = memory

    def take_memory(self, choose, rows, length):
        """
        The GraphMemory of the last batch if this one fits into it, else a new one that both fit
        into. It is taken away, so that a batch that is generated in between gets its own.
        """
        memory, self.memory = self.memory, None
        if memory is not None and memory.choose.banned_ids != choose.banned_ids:
            memory = None
        if memory is not None and not memory.holds(rows, length):
            rows = max(rows, memory.rows)
            length = max(length, memory.length)
            memory = None  # freed before the larger one is made
        return memory or GraphMemory(self.model, choose, rows, length)

    def steps(self, batch, lengths, max_new_tokens, choose, memory=None):
        """Yields as `decode`; memory: a GraphMemory, to replay steps as CUDA graphs."""
        live = LiveRows(self.model, choose, self.end, lengths, max_new_tokens, memory)
        live.prefill(batch)
        yield live.record(*live.newest())

        while live.steps < max_new_tokens and not live.all_finished():
            n = min(GRAPH_STEPS if memory else 1, max_new_tokens - live.steps)
            live.prepare(n)
            for tokens, logprobs in zip(*live.advance(n)):
                news = live.record(tokens, logprobs)
                # Replayed steps may run on after the last row has finished.
                if news:
                    yield news
