"""
Sizes of the model, and the presets: `nano` (two CPU cores), `dense` and `mini` (where recipes for dense pages are tried on a CPU), `small`
(one GPU) and `base` (the published DeepEncoder and a nanochat d20).
Every class of the model is built from these dataclasses alone; nothing in the model knows a preset's name.
"""
from dataclasses import asdict, dataclass, field, fields

from nanochat.clip import CLIP, CLIPConfig

SECOND_STAGES = {"clip": (CLIPConfig, CLIP)}  # kind: what it is built from, and it


@dataclass
class SAMConfig:
    """SAM ViT with the 16x compressor (DeepSeek-OCR paper, section 3.2; defaults are the published ViT-B)."""
    image_size: int = 1024           # px, the size the position tables are stored for
    patch_size: int = 16             # px
    width: int = 768
    depth: int = 12
    n_head: int = 12
    window: int = 14                 # patches; attention is local to window x window patches ...
    global_blocks: tuple = (2, 5, 8, 11)  # ... except in these blocks
    neck: int = 256                  # channels after the neck
    net_2: int = 512                 # channels after the first stride-2 convolution
    net_3: int = 1024                # channels after the second: the encoder's tokens, and CLIP's width


@dataclass
class GPTConfig:
    """nanochat's decoder, October 2025 form."""
    sequence_len: int = 2048
    vocab_size: int = 65536
    n_layer: int = 20
    n_head: int = 10
    n_kv_head: int = 10
    n_embd: int = 1280


@dataclass
class ModelConfig:
    sam: SAMConfig = field(default_factory=SAMConfig)
    second_stage: CLIPConfig = field(default_factory=CLIPConfig)  # or another of SECOND_STAGES
    gpt: GPTConfig = field(default_factory=GPTConfig)
    standardize: str = "none"        # compressor output over the batch: none (published weights) | channel | position
    modes: tuple = ("tiny", "small", "base", "large", "gundam", "gundam-m", "gundam-9", "gundam-m-9")  # image modes this model is made for
    image_token_id: int = -1         # set from the tokenizer

    def __post_init__(self):
        s, c, g = self.sam, self.second_stage, self.gpt
        s.global_blocks, self.modes = tuple(s.global_blocks), tuple(self.modes)
        for what, width, heads in (("sam", s.width, s.n_head), (c.kind, c.width, c.n_head), ("gpt", g.n_embd, g.n_head)):
            if width % heads:
                raise ValueError(f"{what}: width {width} is not a multiple of its {heads} heads")
        if s.net_3 != c.width:
            raise ValueError(f"compressor gives {s.net_3} channels but {c.kind} is {c.width} wide: net_3 must equal its width")
        if s.image_size % (4 * s.patch_size):
            raise ValueError(f"image_size {s.image_size} must be a multiple of 4 patches ({4 * s.patch_size} px)")
        if g.n_head % g.n_kv_head:
            raise ValueError(f"gpt: n_head {g.n_head} is not a multiple of n_kv_head {g.n_kv_head}")
        if self.standardize not in ("none", "channel", "position"):
            raise ValueError(f"standardize={self.standardize!r}: must be none, channel or position")

    @property
    def token_stride(self):
        """Pixels per vision token along one side: patch size times the compressor's two stride-2 convolutions."""
        return 4 * self.sam.patch_size

    def to_dict(self):
        return asdict(self)

    @classmethod
    def from_dict(cls, d):
        """Inverse of `to_dict`; an unknown or missing key raises, so that a config of another version is not guessed at."""
        def build(kind, values):
            names = {f.name for f in fields(kind)}
            if names != set(values):
                raise ValueError(f"{kind.__name__}: unknown keys {sorted(set(values) - names)}, missing keys {sorted(names - set(values))}")
            return kind(**values)
        d = dict(d)
        if "clip" in d:  # checkpoints of before December 2026 knew no other second stage
            d["second_stage"] = {"kind": "clip", **d.pop("clip")}
        kind = d.get("second_stage", {}).get("kind")
        if kind not in SECOND_STAGES:
            raise ValueError(f"second stage of the encoder {kind!r}: must be one of {sorted(SECOND_STAGES)}")
        parts = {"sam": SAMConfig, "second_stage": SECOND_STAGES[kind][0], "gpt": GPTConfig}
        return build(cls, {k: build(parts[k], v) if k in parts else v for k, v in d.items()})


def nano():
    return ModelConfig(
        sam=SAMConfig(image_size=64, patch_size=4, width=128, depth=3, n_head=2, window=8, global_blocks=(2,),
                      neck=128, net_2=192, net_3=256),
        second_stage=CLIPConfig(grid=4, width=256, depth=2, n_head=4, ffn=1024, patch_size=0),
        gpt=GPTConfig(sequence_len=512, vocab_size=512, n_layer=3, n_head=4, n_kv_head=4, n_embd=192),
        standardize="position", modes=("nano",))


def small():
    """One GPU, minutes: dense pages at the paper's geometry (640 px and 100 vision tokens, 512 px and 64)."""
    return ModelConfig(
        sam=SAMConfig(image_size=640, patch_size=16, width=256, depth=6, n_head=4, window=8, global_blocks=(2, 5),
                      neck=256, net_2=320, net_3=512),
        second_stage=CLIPConfig(grid=10, width=512, depth=3, n_head=8, ffn=2048, patch_size=0),
        gpt=GPTConfig(sequence_len=4096, vocab_size=1024, n_layer=5, n_head=6, n_kv_head=6, n_embd=384),
        standardize="position", modes=("small", "tiny"))


def dense():
    """nano on pages of 128 px: as many patches and tokens, in print that can be told apart up to 8 characters a token (16 px a line)."""
    cfg = nano()
    cfg.sam.image_size, cfg.sam.patch_size, cfg.modes = 128, 8, ("dense",)
    return cfg


def mini():
    """The geometry of `small` at 512 px, narrow: two CPU cores see in an hour whether a recipe for dense pages takes off."""
    return ModelConfig(
        sam=SAMConfig(image_size=512, patch_size=16, width=128, depth=4, n_head=2, window=8, global_blocks=(1, 3),
                      neck=128, net_2=192, net_3=256),
        second_stage=CLIPConfig(grid=8, width=256, depth=2, n_head=4, ffn=1024, patch_size=0),
        gpt=GPTConfig(sequence_len=2048, vocab_size=1024, n_layer=4, n_head=4, n_kv_head=4, n_embd=256),
        standardize="position", modes=("tiny",))


def tiny():
    """For tests: everything the nano preset has, at a size where a step takes milliseconds."""
    return ModelConfig(
        sam=SAMConfig(image_size=64, patch_size=8, width=32, depth=2, n_head=2, window=5, global_blocks=(1,),
                      neck=16, net_2=24, net_3=32),
        second_stage=CLIPConfig(grid=2, width=32, depth=1, n_head=2, ffn=64, patch_size=0),
        gpt=GPTConfig(sequence_len=256, vocab_size=512, n_layer=2, n_head=2, n_kv_head=2, n_embd=32),
        standardize="position", modes=("test",))


PRESETS = {"nano": nano, "dense": dense, "mini": mini, "small": small, "base": ModelConfig, "tiny": tiny}
