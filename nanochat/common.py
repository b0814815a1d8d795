"""
Process set-up, devices, printing and small files: the same few lines in every script.
"""
import argparse
import datetime
import errno
import hashlib
import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time

import torch
import torch.distributed as dist

# -----------------------------------------------------------------------------
# Processes


def dist_info():
    """(rank, local rank, world size) from torchrun's environment; (0, 0, 1) without it."""
    rank = int(os.environ.get("RANK", 0))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    return rank, local_rank, world_size


def is_master():
    """Whether this process is the one that prints and writes."""
    return dist_info()[0] == 0


def get_world_size():
    """Number of ranks; 1 without torchrun."""
    return dist_info()[2]


def barrier():
    """Waits until every rank has arrived here."""
    if dist.is_initialized():
        dist.barrier()


def all_reduce(value, op=dist.ReduceOp.SUM):
    """
    A Python number, or a list of them, reduced over ranks, as float(s). This runs on the host:
    no GPU sync.
    """
    if not dist.is_initialized():
        return [float(v) for v in value] if isinstance(value, (list, tuple)) else float(value)
    tensor = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(tensor, op=op)
    return tensor.tolist()


def gather(value):
    """[value of rank 0, of rank 1, ...] on every rank, for small values of plain Python types."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


# -----------------------------------------------------------------------------
# Devices and dtypes


def compute_init(device_type=""):
    """
    Sets up the device, and the process group when torchrun started us. -> torch.device

    device_type: cuda, mps or cpu; empty = the best this machine has.
    Raises ValueError for a device that torch does not find here.
    """
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if not device_type:
        device_type = next(kind for kind, found in available.items() if found)
    if device_type not in available:
        raise ValueError(f"--device-type={device_type}: must be one of {list(available)}")
    if not available[device_type]:
        raise ValueError(f"--device-type={device_type}: torch {torch.__version__} finds no such "
                         f"device here; use --device-type=cpu")
    _, local_rank, world_size = dist_info()
    if device_type == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise ValueError(f"process {local_rank} of this machine has no GPU of its own, there "
                             f"are {torch.cuda.device_count()}: use torchrun "
                             f"--nproc_per_node={torch.cuda.device_count()}")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        set_cuda_defaults()
    else:
        device = torch.device(device_type)
    if world_size > 1 and not dist.is_initialized():
        # Rank 0 may spend long in an evaluation or a checkpoint while the others wait for it.
        timeout = datetime.timedelta(hours=2)
        if device_type == "cuda":  # gloo for numbers that are on the host
            dist.init_process_group("cpu:gloo,cuda:nccl", device_id=device, timeout=timeout)
        else:
            dist.init_process_group("gloo", timeout=timeout)
    return device


def set_cuda_defaults():
    """The settings of kernels that training, scripts and from_pretrained share on a GPU."""
    torch.set_float32_matmul_precision("high")
    # torch prefers cuDNN's attention on Hopper, but cuDNN makes a new plan on the host for every
    # new shape, and packed rows and a growing cache have many. The flash and memory-efficient
    # kernels need no plan.
    torch.backends.cuda.enable_cudnn_sdp(False)


def compute_cleanup():
    if dist.is_initialized():
        dist.destroy_process_group()


def has_bfloat16(device):
    """Whether the hardware computes in bf16; emulation, which is slow, does not count."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return False


def choose_dtype(device, name="auto"):
    """The compute dtype: bf16 where the hardware has it, else fp32, and it says so."""
    if name not in ("auto", "bfloat16", "float32"):
        raise ValueError(f"--dtype={name}: must be auto, bfloat16 or float32")
    if name == "float32":
        return torch.float32
    if has_bfloat16(device):
        return torch.bfloat16
    if name == "bfloat16":
        raise ValueError(f"--dtype=bfloat16: this {device.type} has no bf16; "
                         f"use --dtype=float32 or auto")
    print0(f"This {device.type} has no bf16: computing in fp32, more slowly.")
    return torch.float32


def dtype_name(dtype):
    """"bfloat16" of torch.bfloat16, as --dtype takes it."""
    return str(dtype).removeprefix("torch.")


def choose_compile(device, name="auto"):
    """
    Whether to torch.compile. auto: on CUDA where a compiler is found and works, and never on a
    CPU, where compiling takes as long as it saves in a short run (scripts.bench --compile=yes).
    """
    if name == "no" or (name == "auto" and device.type != "cuda"):
        return False
    reason = why_not_compile(device)
    if reason is None:
        return True
    if name == "yes":
        raise ValueError(f"--compile=yes: {reason}; or use --compile=no")
    banner(f"torch.compile does not work here, so training runs eagerly, more slowly:\n{reason}")
    return False


def why_not_compile(device):
    """What torch.compile lacks on this machine, or None if a trivial function compiles."""
    compilers = ("g++", "c++", "clang++") if device.type == "cpu" else ("gcc", "cc", "clang")
    if not any(shutil.which(compiler) for compiler in compilers):
        return f"it needs one of {', '.join(compilers)} and none is on the PATH: install gcc"

    # Triton compiles a C file against Python.h when it first launches a kernel. Better to find out
    # now that it, or Triton itself, is missing than in the first step.
    x = torch.ones(8, device=device, requires_grad=True)
    try:
        torch.compile(lambda t: (t * 2).relu().sum())(x).backward()
    except Exception as error:  # torch wraps whatever went wrong in classes of its own
        last_line = str(error).strip().splitlines()[-1]
        return (f"{type(error).__name__}: {last_line} (a C compiler, Python's headers, e.g. the "
                f"package python3-dev, and Triton are needed)")
    return None


def synchronize(device):
    """Waits until the device has finished its queued work; a CPU has no queue."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    elif device.type == "mps":
        torch.mps.synchronize()


def to_device(tensor, device):
    """A small tensor on the device. No GPU sync."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()  # copies from pageable memory block
    return tensor.to(device, non_blocking=True)


def matmul_rate(device, dtype):
    """
    FLOP/s of a large matrix product, measured here and now. MFU is a share of this figure, and
    never of a number guessed from a table.
    """
    n = 8192 if device.type == "cuda" else 1536
    a = torch.randn(n, n, device=device, dtype=dtype)
    b = torch.randn(n, n, device=device, dtype=dtype)
    if device.type == "cuda":  # the clocks of an idle GPU are low: warm it up for half a second
        begin = time.perf_counter()
        while time.perf_counter() - begin < 0.5:
            a @ b
            synchronize(device)
    best = float("inf")
    for _ in range(6):
        synchronize(device)
        start = time.perf_counter()
        a @ b
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * n ** 3 / best


# -----------------------------------------------------------------------------
# Printing


def print0(*args, **kwargs):
    """print, on rank 0 only."""
    if is_master():
        print(*args, flush=True, **kwargs)


def banner(text):
    """For what must not be overlooked."""
    print0("!" * 80 + f"\n{text}\n" + "!" * 80)


def json_line(record):
    """A script's last line."""
    print0(json.dumps(record))


OUT_OF_MEMORY = re.compile("out of memory|can't allocate memory", re.IGNORECASE)


def run_main(main):
    """
    Entry point of a script. An expected error ends in one clear line and exit status 1, Ctrl-C in
    one line and status 130; neither shows a traceback.
    """
    # A file name, or a text that a model reads, may have characters that the terminal lacks.
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        main()
        # Only here, when DDP and all else in main's frame is gone: the process group must not be
        # destroyed with DDP, which holds Python's lock while gloo's threads wait for it.
        compute_cleanup()
    except BrokenPipeError as error:
        try:
            sys.stdout.flush()
        except BrokenPipeError:
            # Whoever read our output (`| head`) has had enough. Python would complain once more
            # when it flushes at exit, so what is left goes nowhere.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(141)  # 128 + SIGPIPE, as shells have it
        print(f"error: {error}", file=sys.stderr, flush=True)  # another pipe: a worker's, W&B's
        sys.exit(1)
    except Exception as error:
        if os.environ.get("NANOCHAT_TRACEBACK") or not is_expected(error):
            raise
        print(f"error: {explain(error)}", file=sys.stderr, flush=True)
        sys.exit(1)
    except KeyboardInterrupt:
        print("\ninterrupted; what was saved is kept: training goes on with --resume, vision_eval "
              "with the same command", file=sys.stderr, flush=True)
        sys.exit(130)  # 128 + SIGINT, as shells have it


def missing_package(error):
    """The package that an ImportError is about; "" if it names none."""
    return (error.name or "").split(".")[0]


def out_of_memory(error):
    """Whether memory ran out; on a CPU, and on MPS, only the text of torch's RuntimeError tells."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and bool(OUT_OF_MEMORY.search(str(error)))


def is_expected(error):
    """Whether an error is one that a user can do something about. All others are bugs of ours."""
    if isinstance(error, ImportError):
        return missing_package(error) not in ("nanochat", "scripts", "tasks")
    return isinstance(error, (ValueError, OSError)) or out_of_memory(error)


def explain(error):
    """The text of an expected error: what is wrong, and what to do about it."""
    text = str(error)
    if isinstance(error, ImportError):
        # Packages that only some features need are imported where they are used.
        package = missing_package(error)
        if not package:
            return text
        return f"this needs the package {package}: {sys.executable} -m pip install {package}"

    if out_of_memory(error):
        reason = (text or type(error).__name__).splitlines()[0]
        text = (f"out of memory ({reason}): halve the batch (--device-batch-size, or "
                f"--batch-size), or train with --recompute; training goes on with --resume, its "
                f"steps have the same samples")
    elif getattr(error, "errno", None) == errno.ENOSPC:
        text += ("; make room: training then goes on with --resume, vision_eval with the same "
                 "command")
    return f"{text}\n(set NANOCHAT_TRACEBACK=1 for the traceback)"


# -----------------------------------------------------------------------------
# Command lines


LARGEST_FLOAT = 3e38  # more is infinite in fp32
LARGEST_NUMBER = 10 ** 9  # limit of a flag that sets none of its own


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows all defaults but empty ones: what empty means is in the flag's help text."""
    def _get_help_string(self, action):
        if hasattr(action, "inherited_from"):
            return f"{action.help} (default: {action.inherited_from}'s)"
        if action.default in ("", None, False):
            return action.help
        return super()._get_help_string(action)


class ArgumentParser(argparse.ArgumentParser):
    """
    The parser of every script. doc: the module's docstring, of which the first paragraph introduces
    --help. A mistake ends in one line and exit status 2.
    """
    def __init__(self, doc):
        first_paragraph = " ".join(doc.strip().split("\n\n")[0].split())
        super().__init__(description=first_paragraph, formatter_class=HelpFormatter)

    def error(self, message):
        if is_master():  # not one line from each rank
            sys.stderr.write(f"error: {message} (--help lists the flags)\n")
        sys.exit(2)

    def given(self, argv):
        """Names of the arguments that are on the command line, whatever their values."""
        absent = object()
        names = [action.dest for action in self._actions]
        values = self.parse_args(argv, argparse.Namespace(**dict.fromkeys(names, absent)))
        return {name for name in names if getattr(values, name) is not absent}

    def show_inherited(self, names, source):
        """Makes --help say that these arguments default to those of `source`; see `inherit`."""
        for action in self._actions:
            if action.dest in names:
                action.inherited_from = source

    def inherit(self, argv, theirs, where):
        """
        -> args, where flags that are not on the command line have the values of `theirs`,
        {name: value} from the file `where`. Prints what is inherited and what is overridden.
        ValueError for a value of the wrong type.
        """
        args = self.parse_args(argv)
        given = self.given(argv)
        for name, value in theirs.items():
            flag = f"--{name.replace('_', '-')}"
            default = self.get_default(name)
            kinds = (int, float) if isinstance(default, float) else type(default)
            if not isinstance(value, kinds) or isinstance(value, bool):
                raise ValueError(f"{where}: user_config.{name} is {repr(value)[:80]}, need one "
                                 f"like {default!r}")
            if name not in given:
                setattr(args, name, value)
                print0(f"inherited {flag}={value}")
            elif getattr(args, name) != value:
                print0(f"NOTE: {flag}={getattr(args, name)} overrides {value} of {where}")
        return args


def number(kind, what, low, high, above, off):
    """argparse type: `kind` of a text, within limits; ArgumentTypeError says what it must be."""
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if value == off and off is not None:
            return value
        if low < value <= high or (value == low and not above):  # NaN is in no range
            return value
        limits = f"above {low:g}" if above else f"of {low:g} or more"
        if high < LARGEST_NUMBER or value > high:
            limits += f", at most {high:g}"
        if off is not None:
            limits += f" (or {off:g})"
        raise argparse.ArgumentTypeError(f"{text!r} must be a {what} {limits}")
    return parse


def integer(low, high=LARGEST_NUMBER, off=None):
    """argparse type: a whole number of `low` to `high`, or `off`, the value that switches off."""
    return number(int, "whole number", low, high, False, off)


def real(low=0, high=LARGEST_FLOAT, above=False, off=None):
    """argparse type: a number of `low` (or above it) to `high`, or `off`. Never NaN or infinite."""
    return number(float, "number", low, high, above, off)


positive_int = integer(1)
natural = integer(0)
every_or_never = integer(1, off=-1)  # of steps, pages, ...
positive = real(above=True)  # learning rates and the like
fraction = real(high=1)

# -----------------------------------------------------------------------------
# Small files, hashes, commits


def write_json(path, value):
    """Writes a JSON file whole or not at all."""
    replace_file(path, json.dumps(value, indent=1))


def read_json(path):
    """The content of a JSON file. ValueError that names the file if it is empty or damaged."""
    try:
        with open(path, encoding="utf-8") as f:
            return json.load(f)
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, nested without end
        raise ValueError(f"{path} is not valid JSON ({error})") from error


def read_record(path, keys=()):
    """
    The object in a JSON file. ValueError that names file and key unless it has all of `keys`;
    where `keys` is a dict {key: type}, their values must be of these types.
    """
    record = read_json(path)
    if not isinstance(record, dict):
        raise ValueError(f"{path} has a {type(record).__name__} where an object is expected")
    for key in keys:
        if key not in record:
            raise ValueError(f"{path} lacks the key {key!r}, it has {sorted(record)[:10]}")
        wanted = keys[key] if isinstance(keys, dict) else object
        if not isinstance(record[key], wanted):
            raise ValueError(f"{path}: {key} is {repr(record[key])[:100]}, "
                             f"need a {wanted.__name__}")
    return record


def read_json_lines(path):
    """
    -> (objects of a JSON-lines file, number of damaged lines). A last line without a newline is
    what a killed run leaves; it is skipped and not counted.
    """
    records = []
    damaged = 0
    with open(path, encoding="utf-8", errors="replace") as f:
        for line in f:
            if not line.endswith("\n"):
                break
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                record = None
            if isinstance(record, dict):
                records.append(record)
            else:
                damaged += 1
    return records, damaged


def replace_file(path, text):
    """Writes a text file whole or not at all: a kill leaves the old file or the new one."""
    temporary = f"{path}.tmp"
    with open(temporary, "w", encoding="utf-8") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)


def stable_hash(text):
    """An int that is the same in every process and on every machine; Python's own hash() is not."""
    # File names may hold lone surrogates, which UTF-8 has not.
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big")


def git_commit():
    """Short hash of HEAD, with "+" if tracked files have changes; "unknown" outside a checkout."""
    here = os.path.dirname(os.path.abspath(__file__))

    def git(*args):
        return subprocess.run(["git", *args], capture_output=True, text=True, cwd=here)
    try:
        head = git("rev-parse", "--short", "HEAD")
    except FileNotFoundError:  # no git on this machine
        return "unknown"
    # Installed below another project, this package is none of that project's files.
    ours = git("ls-files", "--error-unmatch", os.path.basename(__file__))
    if head.returncode or ours.returncode:
        return "unknown"
    changes = git("status", "--porcelain", "--untracked-files=no").stdout.strip()
    return head.stdout.strip() + ("+" if changes else "")


# -----------------------------------------------------------------------------
# Weights & Biases


class DummyWandb:
    """Stands in for a W&B run when --run=dummy, and on every rank but 0."""
    def log(self, *args, **kwargs):
        pass

    def finish(self):
        pass


def check_wandb(run):
    """ValueError if --run names a W&B run but wandb is not installed. Call it before the work."""
    if run == "dummy" or "wandb" in sys.modules:
        return
    if importlib.util.find_spec("wandb") is None:
        raise ValueError(f"--run={run} logs to Weights & Biases, which is not installed: "
                         f"pip install wandb, or leave --run out")


def init_wandb(run, config):
    """
    The W&B run of that name in project nano-deepseek-ocr. The key is wandb's own business
    (WANDB_API_KEY or `wandb login`); we never save it.
    """
    if run == "dummy" or not is_master():
        return DummyWandb()
    check_wandb(run)
    import wandb
    try:
        return wandb.init(project="nano-deepseek-ocr", name=run, config=config)
    except wandb.Error as error:
        raise ValueError(f"--run={run}: wandb: {error}; leave --run out to log to files alone, or "
                         f"set WANDB_MODE=offline") from error
