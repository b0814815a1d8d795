"""
Sizes of the model, and the presets: `nano` and `page` (two CPU cores), `dense` and `mini` (to try
recipes for dense pages on a CPU), `small` (one GPU) and `base` (the published DeepEncoder with a
nanochat d20). Every class of the model is built from these dataclasses alone; nothing in the model
knows a preset's name.
"""
from dataclasses import asdict, dataclass, field, fields
from functools import partial

from nanochat.clip import CLIP, CLIPConfig

# The second stage of the encoder: {kind: its class}. How to write another: see nanochat/clip.py.
SECOND_STAGES = {"clip": CLIP}

# DeepSeek-OCR's (paper, table 1). Other modes work too, if their sizes fit the token stride.
PUBLISHED_MODES = (
    "512px", "640px", "1024px", "1280px", "gundam", "gundam-m", "gundam-9", "gundam-m-9")


@dataclass
class SAMConfig:
    """SAM ViT with the 16x compressor (paper, section 3.2). Defaults are the published ViT-B."""
    image_size: int = 1024           # px, the size that the position tables are stored for
    patch_size: int = 16             # px
    width: int = 768
    depth: int = 12
    n_head: int = 12
    window: int = 14                 # attention is local to window x window patches ...
    global_blocks: tuple = (2, 5, 8, 11)  # ... except in these blocks
    neck: int = 256                  # channels after the neck
    net_2: int = 512                 # channels after the first stride-2 convolution
    net_3: int = 1024                # channels after the second: what the second stage takes


@dataclass
class GPTConfig:
    """nanochat's decoder as of October 2025. Defaults are its d20."""
    sequence_len: int = 2048
    vocab_size: int = 65536
    n_layer: int = 20
    n_head: int = 10
    n_kv_head: int = 10
    n_embd: int = 1280


@dataclass(frozen=True)
class TokenLayout:
    """
    How views of a page become vision tokens and decoder positions. image_modes.plan counts with
    it, so that tokenizer, loader and model agree.
    """
    stride: int                      # px along a side that one token of the compressor covers
    sequence: object = None          # function (h, w) -> tokens of a view; None = grid, newlines

    def tokens(self, rows, cols, side):
        """Vision tokens, as the paper counts, of rows x cols views whose grid is side x side."""
        if self.sequence is None:
            return rows * cols * side ** 2
        return rows * cols * self.sequence(side, side)

    def positions(self, rows, cols, side):
        """Decoder positions of the same views, laid out as one page: its newlines come on top."""
        newlines = rows * side if self.sequence is None else 0
        return self.tokens(rows, cols, side) + newlines


@dataclass
class ModelConfig:
    sam: SAMConfig = field(default_factory=SAMConfig)
    second_stage: CLIPConfig = field(default_factory=CLIPConfig)  # or the config of another kind
    gpt: GPTConfig = field(default_factory=GPTConfig)
    modes: tuple = PUBLISHED_MODES   # image modes it is made for; the first is the default
    image_token_id: int = -1         # set from the tokenizer

    def __post_init__(self):
        # JSON has no tuples
        self.sam.global_blocks = tuple(self.sam.global_blocks)
        self.modes = tuple(self.modes)
        check_heads("sam", self.sam.width, self.sam.n_head)
        check_heads("gpt", self.gpt.n_embd, self.gpt.n_head)
        if self.gpt.n_head % self.gpt.n_kv_head:
            raise ValueError(f"gpt: n_head {self.gpt.n_head} is not a multiple of n_kv_head "
                             f"{self.gpt.n_kv_head}")
        if self.sam.net_3 != self.second_stage.width:
            raise ValueError(
                f"the compressor gives {self.sam.net_3} channels but {self.second_stage.kind} is "
                f"{self.second_stage.width} wide: set net_3 to that width")
        if self.sam.image_size % self.token_stride:
            raise ValueError(f"image_size {self.sam.image_size} must be a multiple of 4 patches "
                             f"({self.token_stride} px)")

    @property
    def token_stride(self):
        """Pixels a vision token covers along a side: a patch, and two convolutions of stride 2."""
        return 4 * self.sam.patch_size

    @property
    def second_stage_class(self):
        return SECOND_STAGES[self.second_stage.kind]

    @property
    def feature_width(self):
        """Channels of the encoder's features."""
        if self.second_stage_class.layout == "grid":
            return self.second_stage.width + self.sam.net_3  # joined with the compressor's own
        return self.second_stage.width

    @property
    def layout(self):
        """The TokenLayout of this model's vision tokens."""
        stage = self.second_stage_class
        if stage.layout == "grid":
            return TokenLayout(self.token_stride)
        return TokenLayout(self.token_stride, partial(stage.tokens, self.second_stage))

    def to_dict(self):
        """Plain dicts and tuples, for config.json."""
        return asdict(self)

    @classmethod
    def from_dict(cls, d):
        """Inverse of `to_dict`. Unknown and missing keys raise: a config is not guessed at."""
        d = dict(d)
        kind = d.get("second_stage", {}).get("kind")
        if kind not in SECOND_STAGES:
            raise ValueError(f"second stage of the encoder {kind!r}: must be one of "
                             f"{sorted(SECOND_STAGES)}")

        # A missing part is left to the last `build`, which names it.
        parts = {
            "sam": SAMConfig,
            "second_stage": SECOND_STAGES[kind].config_class,
            "gpt": GPTConfig,
        }
        for name, part_class in parts.items():
            if name in d:
                d[name] = build(part_class, d[name])
        return build(cls, d)


def check_heads(part, width, n_head):
    if width % n_head:
        raise ValueError(f"{part}: width {width} is not a multiple of its {n_head} heads")


def build(config_class, values):
    """A config dataclass from a dict that must have exactly its fields."""
    names = {f.name for f in fields(config_class)}
    unknown = sorted(set(values) - names)
    missing = sorted(names - set(values))
    if unknown or missing:
        raise ValueError(f"{config_class.__name__}: unknown keys {unknown}, missing keys {missing}")
    return config_class(**values)


# -----------------------------------------------------------------------------
# Presets

def nano():
    """Two CPU cores, minutes: pages of 64 px with 16 vision tokens."""
    return ModelConfig(
        sam=SAMConfig(
            image_size=64, patch_size=4, width=128, depth=3, n_head=2, window=8, global_blocks=(2,),
            neck=128, net_2=192, net_3=256),
        second_stage=CLIPConfig(grid=4, width=256, depth=2, n_head=4, ffn=1024, patch_size=0),
        gpt=GPTConfig(
            sequence_len=512, vocab_size=512, n_layer=3, n_head=4, n_kv_head=4, n_embd=192),
        modes=("64px",))


def dense():
    """
    nano on pages of 128 px: as many patches and tokens, with print that is legible up to 8
    characters a token (16 px a line).
    """
    cfg = nano()
    cfg.sam.image_size = 128
    cfg.sam.patch_size = 8
    cfg.modes = ("128px",)
    return cfg


def page():
    """
    Two CPU cores, hours: a paragraph on 256 px with 64 vision tokens. Patches are as in `dense`,
    and SAM looks at windows of 64 px only: letters are local, and the second stage sees the page.
    """
    return ModelConfig(
        sam=SAMConfig(
            image_size=256, patch_size=8, width=128, depth=3, n_head=2, window=8, global_blocks=(),
            neck=128, net_2=192, net_3=256),
        second_stage=CLIPConfig(grid=8, width=256, depth=2, n_head=4, ffn=1024, patch_size=0),
        gpt=GPTConfig(
            sequence_len=1024, vocab_size=512, n_layer=4, n_head=4, n_kv_head=4, n_embd=192),
        modes=("256px",))


def mini():
    """
    The geometry of `small` at 512 px, but narrow: shows on two CPU cores, within an hour, whether
    a recipe for dense pages takes off.
    """
    return ModelConfig(
        sam=SAMConfig(
            image_size=512, patch_size=16, width=128, depth=4, n_head=2, window=8,
            global_blocks=(1, 3), neck=128, net_2=192, net_3=256),
        second_stage=CLIPConfig(grid=8, width=256, depth=2, n_head=4, ffn=1024, patch_size=0),
        gpt=GPTConfig(
            sequence_len=2048, vocab_size=1024, n_layer=4, n_head=4, n_kv_head=4, n_embd=256),
        modes=("512px",))


def small():
    """
    One GPU, minutes: dense pages at the paper's geometry (640 px with 100 vision tokens, 512 px
    with 64).
    """
    return ModelConfig(
        sam=SAMConfig(
            image_size=640, patch_size=16, width=256, depth=6, n_head=4, window=8,
            global_blocks=(2, 5), neck=256, net_2=320, net_3=512),
        second_stage=CLIPConfig(grid=10, width=512, depth=3, n_head=8, ffn=2048, patch_size=0),
        gpt=GPTConfig(
            sequence_len=4096, vocab_size=1024, n_layer=5, n_head=6, n_kv_head=6, n_embd=384),
        modes=("640px", "512px"))


def tiny():
    """For tests: everything that nano has, at a size where a step takes milliseconds."""
    return ModelConfig(
        sam=SAMConfig(
            image_size=64, patch_size=8, width=32, depth=2, n_head=2, window=5, global_blocks=(1,),
            neck=16, net_2=24, net_3=32),
        second_stage=CLIPConfig(grid=2, width=32, depth=1, n_head=2, ffn=64, patch_size=0),
        gpt=GPTConfig(
            sequence_len=256, vocab_size=512, n_layer=2, n_head=2, n_kv_head=2, n_embd=32),
        modes=("64px",))


PRESETS = {
    "nano": nano,
    "dense": dense,
    "page": page,
    "mini": mini,
    "small": small,
    "base": ModelConfig,
    "tiny": tiny,
}
