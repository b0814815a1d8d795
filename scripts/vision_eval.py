"""
Scores a checkpoint on pages it has never seen: greedy, cached, batched generation; 1-NED first.

    python -m scripts.vision_eval --checkpoint=checkpoints/stage2 --controls
    python -m scripts.vision_eval --task=heldout --chars=14-20,31-41,60-68      # a curve
    python -m scripts.vision_eval --checkpoint=checkpoints/reader --task=folder:examples
    python -m scripts.vision_eval --against=checkpoints/other/eval --out=DIR    # two models, paired
    torchrun --standalone --nproc_per_node=8 -m scripts.vision_eval -- \
        --task=omnidocbench --path=DIR --kinds=text,table                       # real pages

Benchmarks are read whole; --max-problems=N asks for a seeded sample, and every figure then says
"N of all". Writes to <out>: report.html (look at this first), curve.png, <task>.jsonl (one line per
page), predictions.jsonl (what was read from each picture; a stopped evaluation, or the same command
after a page was changed, reads only what is missing), md/ for the official OmniDocBench evaluator,
<task>_official.json for Fox's script, and summary.json, which is also the last line printed. The
exit status is 1 when every page of a task failed.
"""
import copy
import hashlib
import importlib.util
import inspect
import os
import random
import sys

from PIL import Image

from nanochat import lines, windows
from nanochat.checkpoint import WEIGHTS, sha256_of
from nanochat.common import (
    ArgumentParser, banner, barrier, check_wandb, compute_init, dtype_name, every_or_never,
    fraction, init_wandb, is_master, json_line, natural, positive_int, print0, read_record,
    run_main, write_json)
from nanochat.conversation import OCR_PROMPT, Task
from nanochat.scoring import Scorer, pixel_hash, read_lines
from nanochat.figures import MAIN, breakdowns_in, curve, figures_of, pages_of
from nanochat.official import write_fox, write_markdown
from nanochat.reader import add_arguments, load_engine
from nanochat.report import against_line, plot_curve, write_html
from nanochat.verdict import CONTROLS, SAID, compare
from tasks.folder import Folder
from tasks.omnidocbench import QUIVR, OmniDocBench
from tasks.registry import EVALUATED, open_set, parse_chars, parse_data, refuse_unused
from tasks.synthdoc import MIN_PX, SPLITS, SynthDoc, random_string

# Flags that change a prediction or a page: results under others must not be mixed.
SETTINGS = ("max_new_tokens", "no_repeat", "path", "chars", "seed", "kinds", "prompt", "damage")
# The tasks that a flag applies to. On others it would be ignored without a word.
USED_BY = {
    "path": ("fox", "fox-cn", "omnidocbench", "chartqa-test", "folder"),
    "allow_outside": ("folder",),
    "chars": SPLITS,
    "damage": (*SPLITS, "fox_like", "omnidocbench_like"),
    "kinds": ("omnidocbench",),
    "prompt": ("omnidocbench",),
}
GENERATED = 256  # pages of a task that makes as many as it is asked for


def parse_args(argv):
    parser = ArgumentParser(__doc__)
    # Model
    add_arguments(parser)
    # Pages
    parser.add_argument("--task", default="heldout,heldout_words,random_chars",
                        help=f"with commas: {', '.join(SPLITS + EVALUATED)}; folder:DIR is short "
                             f"for --task=folder --path=DIR")
    parser.add_argument("--path", default="",
                        help="where the pages of fox, omnidocbench, chartqa-test or folder are; "
                             "empty = on the hub")
    parser.add_argument("--allow-outside", action="store_true",
                        help="let the JSON lines of a folder name pictures outside of it")
    parser.add_argument("--chars", default="",
                        help="synthetic pages: LO-HI characters, or several ranges, each a set of "
                             "its own; empty = as trained")
    parser.add_argument("--damage", type=fraction, default=None,
                        help="scan damage of synthetic pages, 0 to 1 (default: as trained)")
    parser.add_argument("--kinds", default="text",
                        help="what the truth of OmniDocBench's pages holds: text, table, equation")
    parser.add_argument("--prompt", default="",
                        help="what is asked about OmniDocBench's pages; empty = Free OCR.")
    parser.add_argument("--max-problems", type=every_or_never, default=-1,
                        help=f"pages per task, a seeded sample; -1 = all of a benchmark, "
                             f"{GENERATED} where they are made on the fly")
    parser.add_argument("--controls", type=natural, nargs="?", const=64, default=0,
                        help="pages per control: blank, another page, other words")
    parser.add_argument("--seed", type=natural, default=2,
                        help="seed of the synthetic pages (of synthdoc's, 0 trains and 1 "
                             "validates) and of samples")
    parser.add_argument("--batch-size", type=positive_int, default=64,
                        help="pages generated together")
    # Output
    parser.add_argument("--against", default="",
                        help="--out of another evaluation, to compare with page by page")
    parser.add_argument("--run", default="dummy", help="W&B run name; dummy = no W&B")
    parser.add_argument("--samples", type=natural, default=3,
                        help="pages printed per task, truth and prediction")
    parser.add_argument("--report-pages", type=natural, default=256,
                        help="pages per task in report.html, the worst ones")
    parser.add_argument("--out", default="",
                        help="folder for the results; empty = eval_<task> beside the checkpoint")
    args = parser.parse_args(argv)
    given = parser.given(argv)
    set_folder(args, given)
    check_args(args, given)
    return args


def set_folder(args, given):
    """Takes the folder of --task=folder:DIR, as --data names it, for --path."""
    names = []
    for task in args.task.split(","):
        name, colon, path = task.partition(":")
        if name == "folder" and colon:
            if "path" in given or args.path:
                raise ValueError(f"--task={args.task} with --path={args.path}: give one folder")
            args.path = path
            task = name
        names.append(task)
    args.task = ",".join(names)


def check_args(args, given):
    check_wandb(args.run)  # now, and not after the evaluation
    names = args.task.split(",")
    for name in names:
        if name not in SPLITS + EVALUATED:
            raise ValueError(f"--task={name}: must be one of {', '.join(SPLITS + EVALUATED)}")
        if name == "folder" and not args.path:  # the other benchmarks are on the hub
            raise ValueError("--task=folder needs --path, the folder of your pages")
    refuse_unused(given, USED_BY, set(names), what=f"--task={args.task}")


# -----------------------------------------------------------------------------
# Tasks and controls


def tasks_of(args, user_config, image_size):
    """[(name, task), ...] for --task; a synthetic split appears once per range of --chars."""
    generated = GENERATED if args.max_problems == -1 else args.max_problems
    tasks = []
    for name in args.task.split(","):
        if name in SPLITS:  # of SynthDoc, shaped by more flags than the registry passes on
            tasks += split_tasks(name, generated, args, user_config, image_size)
        elif name == "omnidocbench":
            prompt = f"\n{args.prompt}" if args.prompt else OCR_PROMPT
            kinds = tuple(args.kinds.split(","))
            tasks.append((name, OmniDocBench(args.path or QUIVR, kinds, prompt)))
        else:
            flags = copy.copy(args)
            flags.damage = args.damage or 0.0  # the likenesses of benchmarks are clean
            if name == "folder" and trained_on(args.path, user_config):
                task = held_out_part(args.path, user_config, flags.allow_outside)
            else:
                task = open_set(name, args.path, "all", flags, image_size, generated)
            tasks.append((name, task))
    names = [name for name, _ in tasks]
    if len(set(names)) < len(names):
        raise ValueError(f"--task={args.task} --chars={args.chars}: names a task twice, and its "
                         f"pages would count twice in the curve")
    return tasks


def trained_on(path, user_config):
    """Whether the last stage of the model's training had this folder among its --data."""
    for name, arg, _ in parse_data(user_config.get("data", "synthdoc")):
        if name == "folder" and os.path.realpath(arg) == os.path.realpath(path):
            return True
    return False


def held_out_part(path, user_config, allow_outside):
    """The pages of a folder that were held out from training; all of them if none were."""
    val_share = user_config.get("val_share", 0.1)
    try:
        task = Folder(path, "val", val_share, allow_outside=allow_outside)
    except ValueError:  # there is no such page
        print0(f"NOTE: the model was trained on all pages of {path}: how well it reads others, "
               f"this does not tell")
        return Folder(path, "all", allow_outside=allow_outside)
    print0(f"NOTE: the model was trained on {path}: only the {len(task)} pages that were held out "
           f"are read")
    return task


def split_tasks(name, size, args, user_config, image_size):
    """[(name, task), ...] of one split of SynthDoc, with faces, print and damage of training."""
    chars = parse_chars(args.chars or user_config["chars"])
    common = {"image_size": image_size, "faces": user_config["faces"].split(","),
              "min_px": user_config.get("min_px", MIN_PX), "seed": args.seed}
    damage = user_config.get("damage", 0) if args.damage is None else args.damage
    if damage:
        common["damage"] = damage
    # Without --chars the pages are those of training: all its ranges mixed in one set.
    if not args.chars or len(chars) == 1:
        return [(name, SynthDoc(name, size, chars=chars, **common))]
    tasks = []
    for low, high, _ in chars:
        task = SynthDoc(name, size, chars=(low, high), **common)
        tasks.append((f"{name}_{low}-{high}", task))
    return tasks


def sample(pages, wanted, seed):
    """Indices of `wanted` of the pages, in order; -1 = all."""
    order = list(range(pages))
    if wanted == -1 or wanted >= pages:
        return order
    # Drawn, because the first pages of a benchmark are all of one source. The draw of fewer pages
    # is part of the draw of more: whoever asks for more reads only the new ones.
    random.Random(f"sample/{seed}").shuffle(order)
    return sorted(order[:wanted])


class Control(Task):
    """
    A task whose pictures are replaced: by blank ones, or by another page's ("another"). size: of
    blank pictures, in px; None = that of the picture in whose place they stand.
    """

    def __init__(self, task, kind, size=None):
        self.task = task
        self.kind = kind
        self.size = size
        self.answer_metric = task.answer_metric

    def truth(self, i):  # what the model would have to say of the picture that it does not see
        return self.task.truth(i)

    def __len__(self):
        return len(self.task)

    def __getitem__(self, i):
        conversation = self.task[i]
        if self.kind == "another":
            images = self.other_images(i, conversation)
        else:
            images = [Image.new("RGB", self.size or image.size, "white")
                      for image in conversation["images"]]
        return {**conversation, "images": images}

    def other_images(self, i, conversation):
        """The pictures of the next page that shows others; ValueError if all show the same."""
        # The next page, not a random one, so that every picture is used about as often as before.
        # A benchmark may ask several questions about one picture, one after the other.
        own = pixel_hash(conversation["images"]).digest()
        for step in range(1, len(self.task)):
            images = self.task[(i + step) % len(self.task)]["images"]
            if pixel_hash(images).digest() != own:
                return images
        raise ValueError("every page of this task shows the same picture")


def other_words(words, kind, rng):
    """The words in another order ("shuffled"), or random strings as long as they are."""
    if kind == "shuffled":
        return rng.sample(words, len(words))
    strings = []
    for word in words:
        letters = "".join(random_string(rng) for _ in word)  # 2 to 8 characters each: enough
        strings.append(letters[:len(word)])
    return strings


class Reworded(SynthDoc):
    """The pages of a SynthDoc, laid out as they are but with `other_words`, truth included."""

    def __init__(self, task, kind):
        vars(self).update(vars(task))  # the same pages: every argument is the task's
        self.kind = kind

    def blocks(self, i):
        rng, freedom, blocks = super().blocks(i)
        # Not the page's rng, which goes on to draw the layout: that must stay as it was.
        own_rng = random.Random(f"{self.kind}/{i}")
        reworded = []
        for block_kind, words, scale in blocks:
            reworded.append((block_kind, other_words(words, self.kind, own_rng), scale))
        return rng, freedom, reworded


def controls_of(task, engine):
    """{control: task}, as many as the task allows; what each shows is in verdict.CONTROLS."""
    # To a reader in windows a large blank page has none, and the model would not be asked at all.
    known = getattr(engine, "known", None)
    size = known and (known.size, known.size)
    controls = {"blank": Control(task, "blank", size)}
    if len(task) > 1:
        controls["another"] = Control(task, "another")
    if isinstance(task, SynthDoc):  # pages that are drawn from words can be drawn from others
        controls["random_chars"] = Reworded(task, "random_chars")
        controls["shuffled"] = Reworded(task, "shuffled")
    return controls


# -----------------------------------------------------------------------------
# The output folder


def default_out(args):
    parent = args.checkpoint if os.path.isdir(args.checkpoint) else "."
    return os.path.join(parent, "eval_" + args.task.replace(",", "_"))


def settings_of(args, engine, meta, by_character):
    """What the predictions and scores depend on, besides the pages and their number."""
    settings = {
        # Not the checkpoint's name, since a run folder stands for its last checkpoint.
        "weights": sha256_of(os.path.join(engine.folder, WEIGHTS)),
        "by_character": by_character,
        "mode": args.mode or meta["mode"],
        # "auto" would say nothing: it is bf16 on one machine and fp32 on the next
        "dtype": dtype_name(engine.model.dtype),
    }
    for key in SETTINGS:
        settings[key] = getattr(args, key)
    # None for a model that reads without windows, which is also what earlier evaluations have.
    known = getattr(engine, "known", None)
    settings["windows"] = known and known.to_meta()
    if known is not None:
        settings["window_rules"] = source_digest(lines, windows)
    return settings


def source_digest(*modules):
    """Of the source of modules: predictions made by other rules must not be mixed."""
    digest = hashlib.sha256()
    for module in modules:
        digest.update(inspect.getsource(module).encode())
    return digest.hexdigest()


def check_settings(settings, out):
    """Writes <out>/settings.json; ValueError if <out> was begun under other settings."""
    path = os.path.join(out, "settings.json")
    earlier = read_record(path) if os.path.exists(path) else settings
    changes = []
    for key in settings:
        if earlier.get(key) != settings[key]:
            changes.append(f"{key} was {earlier.get(key)!r}, now {settings[key]!r}")
    if changes:
        raise ValueError(f"{out} holds an evaluation under other settings ({'; '.join(changes)}): "
                         "give another --out, or delete it")
    barrier()  # no rank may find what rank 0 writes now
    if is_master() and not os.path.exists(path):
        os.makedirs(out, exist_ok=True)
        write_json(path, settings)
    barrier()  # the folder is there


def rows_against(args, tasks):
    """{task: rows of the other evaluation}; fails before a page is read if it lacks one."""
    if not args.against:
        return {}
    found = {}
    for name, _ in tasks:
        path = os.path.join(args.against, f"{name}.jsonl")
        if not os.path.exists(path):
            raise FileNotFoundError(f"--against={args.against} has no {name}.jsonl: evaluate the "
                                    f"other checkpoint on --task={args.task} first")
        found[name] = read_lines(path)
        if not all("hash" in row for row in found[name]):
            raise ValueError(f"{path} has rows without a hash of their page, from an earlier "
                             "version: evaluate that checkpoint again")
    return found


def write_report(args, out, summary, sections, wandb_run):
    """Everything but the rows, which are there already: report, curve, official files, summary."""
    all_rows = []
    for _, _, rows in sections:
        all_rows += rows

    # the curve, with a note on how many pages it stands on
    by_length = curve(all_rows, "text_tokens")
    by_ratio = curve(all_rows, "tokens_per_vision_token")
    summary["curve"] = by_length
    counts = [f"{name} {pages_of(summary[name])} pages" for name, _, _ in sections]
    png = os.path.join(out, "curve.png")
    plot_curve(png, by_length, ", ".join(counts))

    # the page to look at
    title = f"{args.checkpoint}, step {summary['step']}, mode {summary['mode']}"
    html = os.path.join(out, "report.html")
    write_html(html, title, summary, sections, [by_length, by_ratio], png, args.report_pages)

    # files for the benchmarks' own evaluators
    write_markdown(os.path.join(out, "md"), all_rows)
    for name, _, rows in sections:
        if name in ("fox", "fox-cn"):
            write_fox(os.path.join(out, f"{name}_official.json"), rows)

    write_json(os.path.join(out, "summary.json"), summary)
    if args.run != "dummy":
        log_wandb(wandb_run, args, summary, sections, png)
    print0(f"report: {html}")


def log_wandb(run, args, summary, sections, png):
    """Every figure, the table of pictures and the curve."""
    import wandb
    table = wandb.Table(columns=["task", "page", "truth", "prediction", "1-NED", "flags"])
    for name, task, rows in sections:
        for key, value in summary[name].items():
            if isinstance(value, (int, float)):
                run.log({f"{name}/{key}": value})
        worst_first = sorted(rows, key=lambda row: row["one_minus_ned"])
        for row in worst_first[:args.report_pages]:
            picture = None
            if not row["failed"]:
                picture = wandb.Image(task[row["index"]]["images"][0])
            table.add_data(name, picture, row["truth"], row["prediction"], row["one_minus_ned"],
                           ", ".join(row["flags"]))
    run.log({"pages": table, "curve": wandb.Image(png)})
    run.finish()


# -----------------------------------------------------------------------------
# Printing


def print_reuse(name, counts, pages):
    """How much of a task is of an earlier run, if any."""
    reused = counts["reused"]
    if reused:
        changed = (f"{counts['rescored']} scored anew as their truth changed, "
                   f"{counts['renamed']} renamed")
        print0(f"{name}: {reused} of {pages} predictions are of an earlier run ({changed}), "
               f"{pages - reused} read now")


def print_figures(name, figures):
    scores = [f"{key} {figures[key]:.4f}" for key in MAIN if key in figures]
    density = f"{figures['chars_per_vision_token']:.2f} characters per vision token"
    rates = f"{figures['pages_per_sec']:.1f} pages/s, {figures['tokens_per_sec']:.0f} tok/s"
    quantiles = [f"{key} {value:.3f}" for key, value in figures["quantiles"].items()]
    print0(f"{name}: {figures['verdict']}")
    print0(f"  {pages_of(figures)} pages, {density} | {' | '.join(scores)} | {rates}")
    print0("  (precision counts only what was written: misleading when the output is short)")
    print0(f"  1-NED of pages: {', '.join(quantiles)}")

    for kind, control in figures["controls"].items():
        pages = f"{control['samples']} of {figures['of']} pages"
        score = f"1-NED {control['one_minus_ned']:.4f}"
        print0(f"  control {kind} ({CONTROLS[kind]}): {score} on {pages}")
    for score, attribute, groups in breakdowns_in(figures):
        print_breakdown(f"{score} by {attribute}", groups)
    if "against" in figures:
        print0(f"  {against_line(figures['against'])}")


def print_breakdown(title, groups):
    parts = []
    for value, (score, pages, ci95) in groups.items():
        low, high = ci95
        parts.append(f"{value} {score:.3f} ({low:.3f}-{high:.3f}, {pages})")
    print0(f"  {title}: {', '.join(parts)}")


def print_pages(rows, number):
    """The first pages, truth above prediction."""
    for row in rows[:number]:
        truth = row["truth"] or ""  # None if the page could not be opened
        prediction = row["prediction"]
        print0(f"  {row['one_minus_ned']:.2f}  truth {truth[:200]!r}")
        print0(f"        reads {prediction[:200]!r}")


def print_warnings(figures, rows, limit):
    """What must not be overlooked: pages that failed, were cut short or were not read at all."""
    total = len(rows)
    failed = [row for row in rows if row["failed"]]
    cut = [row for row in rows if not row.get("finished", True)]  # a failed page has no end
    lines = []
    if failed:
        first = failed[0]["error"]
        lines.append(f"{len(failed)} of {total} pages failed and count as wrong; the first: "
                     f"{first}")
    if len(cut) > SAID * total:
        first = cut[0]["id"]
        lines.append(f"{len(cut)} of {total} pages were cut short by the limit of {limit} tokens "
                     f"(or the decoder's room), so their scores are too low unless they loop: "
                     f"raise --max-new-tokens. The first: {first}")
    if total < figures["of"]:
        name = figures["task"]
        lines.append(f"{name} was read in part: {pages_of(figures)} pages. Not a benchmark's "
                     "number")
    if lines:
        banner("\n".join(lines))


# -----------------------------------------------------------------------------
# The evaluation


def evaluate_task(scorer, name, task, args, against):
    """Reads a task and its controls, and prints what came of it. -> (figures, rows)."""
    # the task
    indices = sample(len(task), args.max_problems, args.seed)
    limit = scorer.token_limit(task, indices)
    rows, counts = scorer.score_pages(name, task, indices, limit)
    print_reuse(name, counts, len(rows))

    # its controls, on some of the pages read: scores are compared page by page
    controls = {}
    if args.controls:
        wanted = min(args.controls, len(rows))
        some = sample(len(task), wanted, args.seed)  # part of `indices`, by the same seed
        for kind, other in controls_of(task, scorer.engine).items():
            # Random letters take more tokens than words, so the limit is the control's own.
            other_limit = scorer.token_limit(other, some)
            other_name = f"{name}.{kind}"
            controls[kind], _ = scorer.score_pages(other_name, other, some, other_limit)

    # what came of it
    figures = figures_of(name, rows, controls, of=len(task))
    figures["reused"] = counts["reused"]
    figures["max_new_tokens"] = limit
    if name in against:
        try:
            comparison = compare(rows, against[name])
        except ValueError as error:  # no page in common: no reason to lose what was read
            print0(f"NOTE: not compared with --against={args.against}: {error}")
        else:
            figures["against"] = {"out": args.against, **comparison}
    print_figures(name, figures)
    print_pages(rows, args.samples)
    print_warnings(figures, rows, limit)
    return figures, rows


def run(args, engine, meta):
    """Evaluates with a loaded engine. -> summary, with the figures of every task by name."""
    # Fox's script cuts Chinese into words with jieba; without it the words are single characters.
    by_character = importlib.util.find_spec("jieba") is None
    if by_character:
        print0("jieba is not installed: f1 and precision of Chinese pages count characters")

    # tasks; pages are drawn at the encoder's own size, so that they are the same in every mode and
    # two modes can be compared
    tasks = tasks_of(args, meta["user_config"], engine.model.cfg.sam.image_size)
    out = args.out or default_out(args)
    against = rows_against(args, tasks)
    check_settings(settings_of(args, engine, meta, by_character), out)
    wandb_run = init_wandb(args.run, vars(args))  # before the work: it may ask for a key

    # reading and figures
    scorer = Scorer(engine, out, args.batch_size, args.max_new_tokens, by_character)
    summary = {"checkpoint": args.checkpoint, "step": meta["step"],
               "mode": args.mode or meta["mode"], "seed": args.seed}
    sections = []
    for name, task in tasks:
        figures, rows = evaluate_task(scorer, name, task, args, against)
        summary[name] = figures
        sections.append((name, task, rows))
    # A script that runs one task finds its figures at the top of the summary, too.
    if len(tasks) == 1:
        [(only_task, _)] = tasks
        for key, value in summary[only_task].items():
            if not isinstance(value, dict):
                summary[key] = value

    # report
    if is_master():
        print0("writing the report")
        write_report(args, out, summary, sections, wandb_run)
    return summary


def main(argv=None):
    args = parse_args(argv)
    device = compute_init(args.device_type)
    engine, meta = load_engine(args, device)
    summary = run(args, engine, meta)
    json_line(summary)

    # A benchmark that is broken as a whole gives a number too: 0. A shell script must notice.
    for figures in summary.values():
        if isinstance(figures, dict) and figures["failed"] == figures["samples"]:
            sys.exit(1)


if __name__ == "__main__":
    run_main(main)
