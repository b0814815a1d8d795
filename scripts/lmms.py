"""
Runs the tasks of lmms-eval (ChartQA, DocVQA, OCRBench, ...) on a checkpoint. An optional extra: it
brings some fifty packages, so give it an environment of its own.

    pip install -e . lmms-eval==0.7.3 "filelock<4"
    python -m scripts.lmms --tasks=chartqa --model_args=checkpoint=checkpoints/stage2 --batch_size=16

Flags are lmms-eval's own, and --model is set. --model_args takes checkpoint, mode, dtype,
device_type and no_repeat, with the meaning and the defaults that they have as flags of scripts.ocr.
"""
import argparse
import sys

from tqdm import tqdm

from nanochat.common import banner, compute_init, run_main
from nanochat.scoring import room_left
from nanochat.reader import add_arguments, load_engine

try:
    from lmms_eval.api.model import lmms
except ImportError as error:
    raise SystemExit(f"error: {error}: pip install lmms-eval==0.7.3 'filelock<4', best in an "
                     "environment of its own") from error

NAME = "nano_deepseek_ocr"


def conversation_of(images, question, id):
    """Pictures and a question in the form that training uses: pictures first, then a new line."""
    content = [{"type": "image"} for _ in images]
    content.append({"type": "text", "text": f"\n{question}" if images else question})
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": ""}]
    return {"messages": messages, "images": images, "id": id}


def cut_at(text, until):
    """The text up to the first of the strings that a task ends an answer with."""
    for stop in [until] if isinstance(until, str) else until:
        if stop:
            text = text.split(stop)[0]
    return text


class LmmsModel(lmms):
    """lmms-eval's interface to one loaded checkpoint; one process, greedy."""
    is_simple = True  # requests hold pictures and one question, not a chat

    def __init__(self, batch_size=1, max_batch_size=None, device=None, **flags):
        super().__init__()
        parser = argparse.ArgumentParser()
        add_arguments(parser)
        args = parser.parse_args([f"--{key.replace('_', '-')}={flags[key]}" for key in flags])
        args.device_type = args.device_type or (device or "").partition(":")[0]
        self.engine, _ = load_engine(args, compute_init(args.device_type))
        self.batch_size = int(batch_size)

    def ask(self, request):
        """-> (conversation, tokens that the answer may take, strings that end it) of a request."""
        question, settings, doc_to_visual, doc, task, split = request.args
        images = doc_to_visual(self.task_dict[task][split][doc]) or []
        conversation = conversation_of(images, question, f"{task}/{split}/{doc}")
        limit = room_left(self.engine, conversation)
        if settings.get("max_new_tokens"):
            limit = min(limit, settings["max_new_tokens"])
        return conversation, limit, settings.get("until") or []

    def generate_until(self, requests):
        """-> one text per request. A question that the model cannot take gets an empty answer."""
        answers = []
        errors = []
        for start in tqdm(range(0, len(requests), self.batch_size), desc="batches"):
            for result in self.answer(requests[start:start + self.batch_size]):
                if isinstance(result, Exception):
                    errors.append(result)
                    result = ""
                answers.append(result)
        if errors:
            banner(f"{len(errors)} of {len(requests)} questions were not answered and count as "
                   f"wrong; the first: {errors[0]}")
        return answers

    def answer(self, requests):
        """-> the text or the ValueError of each request of a batch."""
        answers = [None] * len(requests)
        asked = {}  # index -> what `ask` returns
        for i, request in enumerate(requests):
            try:
                asked[i] = self.ask(request)
            except ValueError as error:  # the prompt leaves no room
                answers[i] = error
        if asked:
            conversations = [conversation for conversation, _, _ in asked.values()]
            limit = min(limit for _, limit, _ in asked.values())  # alike within a task
            results = self.engine.generate_each(conversations, limit)
            for i, result in zip(asked, results):
                _, _, until = asked[i]
                failed = isinstance(result, Exception)
                answers[i] = result if failed else cut_at(result.text, until)
        return answers

    def loglikelihood(self, requests):
        raise NotImplementedError("tasks that compare likelihoods are not supported: choose one "
                                  "that generates its answers (output_type: generate_until)")

    def generate_until_multi_round(self, requests):
        raise NotImplementedError("tasks of several rounds are not supported")


def main():
    from lmms_eval.__main__ import cli_evaluate_single, parse_eval_args
    from lmms_eval.models import MODEL_REGISTRY_V2
    from lmms_eval.models.registry_v2 import ModelManifest
    from lmms_eval.utils import make_table
    # By its module's name, since this file runs as __main__.
    MODEL_REGISTRY_V2.register_manifest(ModelManifest(NAME, "scripts.lmms.LmmsModel"))
    sys.argv[1:1] = [f"--model={NAME}"]
    _, args = parse_eval_args()
    # Not its cli_evaluate, which logs an error and exits with status 0.
    results, _ = cli_evaluate_single(args)
    print(make_table(results))


if __name__ == "__main__":
    run_main(main)
