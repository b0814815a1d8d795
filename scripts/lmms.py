"""
Runs the tasks of lmms-eval (ChartQA, DocVQA, OCRBench, ...) on a checkpoint.

    pip install -e . lmms-eval==0.7.3 "filelock<4"
    python -m scripts.lmms --checkpoint=checkpoints/stage2 --tasks=chartqa --batch-size=16

lmms-eval is an optional extra that brings some fifty packages: give it an environment of its own.
Only tasks that generate their answers work, not those that compare likelihoods. Prints lmms-eval's
table; the last line is the same as JSON.
"""
from collections import defaultdict

from tqdm import tqdm

from nanochat.common import (
    ArgumentParser, banner, compute_init, every_or_never, json_line, positive_int, run_main)
from nanochat.reader import add_arguments, load_engine
from nanochat.scoring import room_left


def conversation_of(images, question, id):
    """Pictures and a question in the form that training uses: pictures first, then a new line."""
    content = [{"type": "image"} for _ in images]
    content.append({"type": "text", "text": f"\n{question}" if images else question})
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": ""}]
    return {"messages": messages, "images": images, "id": id}


def cut_at(text, until):
    """The text up to the first of the strings that a task ends an answer with."""
    stops = [until] if isinstance(until, str) else until
    for stop in stops:
        # lmms-eval adds a blank line where a task names none, to stop models without an end token.
        # This one has an end token, and writes blank lines between the blocks of a page.
        if stop and stop != "\n\n":
            text = text.split(stop)[0]
    return text


class Answers:
    """
    What lmms-eval asks of a model, on one loaded engine, greedily. `main` makes it a subclass of
    lmms_eval.api.model.lmms, which sets self.task_dict: {task: {split: rows}}.

    max_new_tokens  tokens of an answer where a task sets no limit of its own
    """
    is_simple = True  # requests hold pictures and one question, not a chat

    def __init__(self, engine, batch_size, max_new_tokens):
        super().__init__()
        self.engine = engine
        self.batch_size = batch_size
        self.max_new_tokens = max_new_tokens

    def ask(self, request):
        """-> (conversation, tokens that the answer may take, strings that end it) of a request."""
        question, settings, doc_to_visual, doc, task, split = request.args
        images = doc_to_visual(self.task_dict[task][split][doc]) or []
        conversation = conversation_of(images, question, f"{task}/{split}/{doc}")
        room = room_left(self.engine, conversation)
        ours = room if self.max_new_tokens == -1 else self.max_new_tokens
        limit = settings.get("max_new_tokens") or ours
        return (conversation, min(limit, room),
                settings.get("until") or [])

    def answer(self, requests):
        """-> the text or the ValueError of each request of a batch."""
        answers = [None] * len(requests)
        # A batch has one limit; a question with little room must not cut the others' answers.
        asked = defaultdict(list)  # limit -> [(index, conversation, until), ...]
        for i, request in enumerate(requests):
            try:
                conversation, limit, until = self.ask(request)
            except ValueError as error:  # the prompt leaves no room
                answers[i] = error
            else:
                asked[limit].append((i, conversation, until))

        for limit, group in asked.items():
            conversations = [conversation for _, conversation, _ in group]
            results = self.engine.generate_each(conversations, limit)
            for (i, _, until), result in zip(group, results):
                failed = isinstance(result, Exception)
                answers[i] = result if failed else cut_at(result.text, until)
        return answers

    def generate_until(self, requests):
        """-> one text per request. A question that the model cannot take gets an empty answer."""
        answers = []
        errors = []
        for start in tqdm(range(0, len(requests), self.batch_size), desc="batches"):
            for answer in self.answer(requests[start:start + self.batch_size]):
                if isinstance(answer, Exception):
                    errors.append(answer)
                    answer = ""
                answers.append(answer)
        if errors:  # lmms-eval knows no failures
            banner(f"{len(errors)} of {len(requests)} questions were not answered and count as "
                   f"wrong; the first: {errors[0]}")
        return answers

    def loglikelihood(self, requests):
        raise NotImplementedError("tasks that compare likelihoods are not supported: choose one "
                                  "that generates its answers (output_type: generate_until)")

    def generate_until_multi_round(self, requests):
        raise NotImplementedError("tasks of several rounds are not supported")


def main(argv=None):
    parser = ArgumentParser(__doc__)
    add_arguments(parser)
    parser.add_argument("--tasks", default="chartqa", help="names of lmms-eval's, with commas")
    parser.add_argument("--batch-size", type=positive_int, default=16,
                        help="questions answered together")
    parser.add_argument("--limit", type=every_or_never, default=-1,
                        help="questions per task; -1 = all")
    args = parser.parse_args(argv)

    # only now, so that --help works without it
    try:
        from lmms_eval.api.model import lmms
        from lmms_eval.evaluator import simple_evaluate
        from lmms_eval.utils import make_table
    except ImportError as error:
        raise ValueError(f"{error}: pip install lmms-eval==0.7.3 'filelock<4', best in an "
                         "environment of its own") from error

    class NanoDeepseekOCR(Answers, lmms):  # lmms-eval prints the name
        pass

    engine, _ = load_engine(args, compute_init(args.device_type))
    model = NanoDeepseekOCR(engine, args.batch_size, args.max_new_tokens)
    limit = None if args.limit == -1 else args.limit
    results = simple_evaluate(model, tasks=args.tasks.split(","), batch_size=args.batch_size,
                              limit=limit, log_samples=False)
    print(make_table(results))
    json_line({"checkpoint": args.checkpoint, **results["results"]})


if __name__ == "__main__":
    run_main(main)
