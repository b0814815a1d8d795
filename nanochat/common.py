"""Process set-up, devices and printing: the same few lines in every script."""
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time

import torch
import torch.distributed as dist


def dist_info():
    """(rank, local rank, world size), from torchrun's environment; (0, 0, 1) without it."""
    return tuple(int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))


def print0(*args, **kwargs):
    if dist_info()[0] == 0:
        print(*args, flush=True, **kwargs)


def banner(text):
    """For what must not be overlooked."""
    print0("!" * 80 + f"\n{text}\n" + "!" * 80)


def compute_init(device_type=""):
    """
    -> torch.device. Under torchrun joins the process group (nccl on cuda, gloo elsewhere). `device_type` empty: the best there is.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    kind = device_type or next(k for k, ok in available.items() if ok)
    if kind not in available:
        raise ValueError(f"--device-type={kind}: must be one of {list(available)}")
    if not available[kind]:
        raise ValueError(f"--device-type={kind}: torch {torch.__version__} finds no such device here; use --device-type=cpu")
    rank, local_rank, world = dist_info()
    device = torch.device("cuda", local_rank) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(device)
        set_cuda_defaults()
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    return device


def set_cuda_defaults():
    """How matrix products and attention are computed on CUDA; for training and reading alike."""
    torch.set_float32_matmul_precision("high")
    # cuDNN's attention, which torch prefers on Hopper, plans on the host for every new shape, and
    # packed samples and a growing cache have many. Flash and memory-efficient kernels do no planning
    # (scripts.bench --cudnn measures what it would give where shapes are fixed).
    torch.backends.cuda.enable_cudnn_sdp(False)


def compute_cleanup():
    if dist.is_initialized():
        dist.destroy_process_group()


def choose_dtype(device, name="auto"):
    """Compute dtype: bf16 where the hardware has it, else fp32, and it says so."""
    if name not in ("auto", "bfloat16", "float32"):
        raise ValueError(f"--dtype={name}: must be auto, bfloat16 or float32")
    if name == "float32":
        return torch.float32
    has_bf16 = {"cuda": lambda: torch.cuda.is_bf16_supported(including_emulation=False), "mps": lambda: False,
                "cpu": lambda: torch.ops.mkldnn._is_mkldnn_bf16_supported()}[device.type]()
    if has_bf16:
        return torch.bfloat16
    if name == "bfloat16":
        raise ValueError(f"--dtype=bfloat16: this {device.type} has no bf16; use --dtype=float32 or auto")
    print0(f"This {device.type} has no bf16: computing in fp32, more slowly.")
    return torch.float32


def choose_compile(device, name="auto"):
    """
    Whether to torch.compile. auto: on CUDA where a compiler is found; not on a CPU, where compiling takes what a short run saves
    (python -m scripts.bench --compile=both).
    """
    found = any(map(shutil.which, ("g++", "c++", "clang++") if device.type == "cpu" else ("gcc", "cc", "clang")))
    if name == "yes" and not found:
        raise ValueError("--compile=yes needs a C++ compiler (on CUDA a C compiler), and none is on the PATH: install gcc, or --compile=no")
    return name == "yes" or (name == "auto" and device.type == "cuda" and found)


def all_reduce(value, device, op=dist.ReduceOp.SUM):
    """A Python number, or a list of them, reduced over ranks, as float(s)."""
    if not dist.is_initialized():  # nothing to wait for
        return [float(v) for v in value] if isinstance(value, (list, tuple)) else float(value)
    t = torch.tensor(value, dtype=torch.float64, device=device if device.type == "cuda" else "cpu")  # gloo takes CPU tensors
    dist.all_reduce(t, op=op)
    return t.tolist()


def gather(value):
    """[value of rank 0, of rank 1, ...] on every rank; for small things of plain Python types."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def barrier():
    if dist.is_initialized():
        dist.barrier()


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize()
    elif device.type == "mps":
        torch.mps.synchronize()


def matmul_rate(device, dtype):
    """FLOP/s of a large matrix product, measured here and now: what MFU is a share of. Never a guess from a table."""
    n = 8192 if device.type == "cuda" else 1536
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    best, begin = float("inf"), time.perf_counter()
    while device.type == "cuda" and time.perf_counter() - begin < 0.5:  # an idle GPU's clocks are low
        a @ b
        synchronize(device)
    for _ in range(6):
        synchronize(device)
        start = time.perf_counter()
        a @ b
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * n ** 3 / best


def stable_hash(text):
    """An int that is the same in every process and on every machine, which Python's own hash() is not."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def write_json(path, value):
    with open(path, "w") as f:
        json.dump(value, f, indent=1)


def read_json(path):
    with open(path) as f:
        return json.load(f)


def git_commit():
    """Short hash, with "+" when the tree has changes; "unknown" outside a checkout."""
    def git(*args):
        return subprocess.run(["git", *args], capture_output=True, text=True, cwd=os.path.dirname(os.path.abspath(__file__)))
    try:
        head = git("rev-parse", "--short", "HEAD")
    except FileNotFoundError:  # no git on this machine
        return "unknown"
    if head.returncode:
        return "unknown"
    return head.stdout.strip() + ("+" if git("status", "--porcelain", "--untracked-files=no").stdout.strip() else "")


def json_line(record):
    """A script's last line."""
    print0(json.dumps(record))


def run_main(main):
    """Entry point of a script: an expected error ends in one clear line and exit status 1, not in a traceback of our frames."""
    try:
        main()
    except (ValueError, FileNotFoundError, FileExistsError, OSError) as e:
        if os.environ.get("NANOCHAT_TRACEBACK"):
            raise
        print(f"error: {e}\n(set NANOCHAT_TRACEBACK=1 for the traceback)", file=sys.stderr, flush=True)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        sys.exit(130)  # 128 + SIGINT, as shells have it


class DummyWandb:
    """Stands in for a wandb run when --run=dummy or on ranks other than 0."""
    def log(self, *args, **kwargs):
        pass

    def finish(self):
        pass


def init_wandb(run, config):
    """Project nano-deepseek-ocr; the key is wandb's own business (WANDB_API_KEY or `wandb login`) and is never saved by us."""
    if run == "dummy" or dist_info()[0] != 0:
        return DummyWandb()
    import wandb
    return wandb.init(project="nano-deepseek-ocr", name=run, config=config)
