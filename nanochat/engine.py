"""
Generation: a batch of conversations with images in, texts out. Images are encoded once; the prompt fills the KV cache; then
one token per row and step, until the row ends or its budget is spent. Finished rows leave the batch.
"""
from dataclasses import dataclass

import torch

from nanochat.dataloader import Batch, collate
from nanochat.gpt import KVCache
from nanochat.image_modes import preprocess
from nanochat.tokenizer import SPECIAL_TOKENS


@dataclass
class Result:
    text: str
    tokens: int           # generated, the end token included
    finished: bool        # ended by itself, not by the limit
    confidence: float     # mean log-probability (nats) of the generated tokens


class Engine:
    def __init__(self, model, tokenizer, mode):
        self.model, self.tokenizer, self.mode = model, tokenizer, mode
        self.end = tokenizer.encode_special("<|assistant_end|>")
        # never generated: placeholders and every special token but the end
        self.banned = [i for i in map(tokenizer.encode_special, SPECIAL_TOKENS) if i != self.end]

    def prompt_batch(self, conversations):
        """-> (Batch on the model's device, prompt length of each row)."""
        samples = []
        for c in conversations:
            images = [preprocess(image, self.mode, self.model.cfg.token_stride) for image in c["images"]]
            ids = self.tokenizer.render_for_completion(c, [p.positions for p, _, _ in images])
            samples.append((ids + [0], [0] * (len(ids) + 1), images, 0))  # collate shifts by one; nothing is supervised
        return collate(samples).to(self.model.device), [len(s[0]) - 1 for s in samples]

    @torch.inference_mode()
    def generate(self, conversations, max_new_tokens, temperature=0.0, seed=0):
        """-> one Result per conversation. temperature 0 = greedy."""
        if self.model.training:
            raise ValueError("the model is in training mode: call model.eval() first")
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens {max_new_tokens}: must be at least 1")
        batch, lengths = self.prompt_batch(conversations)
        return self.decode(batch, lengths, max_new_tokens, temperature, seed)

    def decode(self, batch: Batch, lengths, max_new_tokens, temperature, seed):
        model, gpt, device = self.model, self.model.gpt, self.model.device
        B = len(lengths)
        rng = torch.Generator(device).manual_seed(seed) if temperature > 0 else None
        cache = KVCache(gpt.cfg, B, max(lengths) + max_new_tokens, device, model.dtype)
        hidden = gpt(model.embed(batch), cache=cache)
        position = torch.tensor(lengths, device=device)  # where each row's next token goes
        hidden = hidden[torch.arange(B, device=device), position - 1]
        rows = torch.arange(B, device=device)            # which conversation each live row is
        tokens, logprobs = [[] for _ in range(B)], [0.0] * B
        for step in range(max_new_tokens):
            logits = gpt.logits(hidden)
            logits[:, self.banned] = float("-inf")
            choice = logits.argmax(-1) if rng is None else \
                torch.multinomial((logits / temperature).softmax(-1), 1, generator=rng)[:, 0]
            chosen = logits.log_softmax(-1).gather(1, choice[:, None])[:, 0]
            for row, token, lp in zip(rows.tolist(), choice.tolist(), chosen.tolist()):
                tokens[row].append(token)
                logprobs[row] += lp
            alive = choice != self.end
            if not alive.all():
                rows, position, choice = rows[alive], position[alive], choice[alive]
                if not len(rows):
                    break
                cache.keep_rows(alive)
            if step + 1 < max_new_tokens:
                x = gpt.transformer.wte(choice)[:, None].to(model.dtype)
                hidden = gpt(x, cache=cache, positions=position[:, None])[:, 0]
                position = position + 1
        results = []
        for ids, lp in zip(tokens, logprobs):
            finished = ids[-1] == self.end
            text = self.tokenizer.decode(ids[:-1] if finished else ids)
            results.append(Result(text, len(ids), finished, lp / len(ids)))
        return results
