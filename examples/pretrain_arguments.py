"""What `pretrain_unicl.py` can be told: every field is an option of its command line and a key of its YAML file."""

from dataclasses import dataclass, field

from transformers_florence.data.sources import make_sources
from transformers_florence.training.arguments import check_fields
from transformers_florence.training.objectives import OBJECTIVES

PRECISIONS = ("auto", "float32", "bfloat16", "float16")
TEMPLATE_KINDS = ("photo", "drawing")
# A checkpoint belongs to these; every other argument may differ when its run goes on.
FIXED = (
    "size",
    "init_from",
    "locked",
    "image_size",
    "window_size",
    "objective",
    "batch_size",
    "learning_rate",
    "text_rate",
    "token_rate",
    "prototype_rate",
    "weight_decay",
    "context_length",
    "prototype_weight",
    "alignment_weight",
    "ema_decay",
    "leave_out_templated",
    "streaming",
    "seed",
    "texts",
)


@dataclass
class PretrainArguments:
    """What a run is made of; two runs with equal arguments on one machine give equal weights."""

    # Data: the corpus in memory, or sets on disk as `data.sources.Source` describes them: mappings in the YAML file,
    # texts of JSON on the command line.
    corpus: str = "corpus"
    sources: list[str] = field(default_factory=list)  # read instead of the corpus, by their weights
    held_out: list[str] = field(default_factory=list)  # of the same form: what evaluation looks at
    streaming: bool = False  # read shards one after the other, instead of all rows in a new order each epoch
    shuffle_buffer: int = 1000  # rows of a stream in memory, for each worker and source
    workers: int = 0  # processes that read and decode, for each training process
    bad_samples: str = "skip"  # what a picture that cannot be read does: be passed over and counted, or raise
    templates: str = "photo"  # of which short texts are put into one: photo or drawing
    leave_out_templated: bool = False  # the paper's second stage: texts in templates are not drawn at all
    # Model
    output: str = "runs/florence-nano"
    size: str = "nano"
    init_from: str = ""  # folder of a checkpoint to go on from, instead of new weights of that size
    image_size: int = 0  # side of the pictures in pixels; 0 for the model's own
    window_size: int = 0  # side of the attention windows in tokens, to which bias tables are resized; 0 for its own
    vocabulary: str = ""  # folder of a processor whose tokenizer to take; without it, one is learnt from the texts
    vocabulary_texts: int = 1_000_000  # texts of the sources that it is learnt from, at most
    locked: bool = False  # whether the image tower of `init_from` stays as it is (LiT)
    # Training
    objective: str = "unicl"  # unicl; clip: every pair its own label; sigmoid: SigLIP's loss with UniCL's labels
    steps: int = 4000
    batch_size: int = 256  # pictures of a step, on all processes together
    chunk_size: int = 0  # pictures that are in a process's memory at once (gradient cache); 0 for all
    activation_checkpointing: bool = False  # keep only what enters each layer, and compute it again going backwards
    processes: int = 0  # how many must share the batches; 0 for as many as there are
    learning_rate: float = 1e-3
    weight_decay: float = 0.1
    warmup_steps: int = 200
    max_grad_norm: float = 1.0
    text_rate: float = 1.0  # learning rate of the text tower, relative to the image tower's
    token_rate: float = 20.0  # the same of its token embeddings, of which a batch moves only its own words'
    prototype_rate: float = 5.0  # the same of the label prototypes
    prototype_weight: float = 1.0  # of the corpus's label prototypes beside the contrastive loss; 0 for none
    alignment_weight: float = 5.0  # of the texts' distance to their prototypes
    ema_decay: float = 0.0  # of the running average of the weights that is evaluated and saved too; 0 for none
    augmentation: float = 1.0  # its full strength
    augmentation_ramp: float = 0.4  # part of the run over which augmentation grows from nothing to full strength
    small_part: float = 0.6  # first part of the run, with pictures of half the side and texts of two thirds the length
    category_batches: float = 0.1  # part of the corpus's batches whose texts and labels are categories
    keyword_batches: float = 0.15  # part of the corpus's batches whose texts and labels are single keywords
    stored_size: int = 80  # side of the corpus's pictures in memory, pixels
    context_length: int = 24  # tokens
    precision: str = "auto"  # auto: bfloat16 where the processor has it; float32; bfloat16; float16 with a loss scale
    # Around it
    log_every: int = 20
    eval_every: int = 500
    save_every: int = 250
    keep: int = 2  # checkpoints, the newest ones
    non_finite: str = "raise"  # what a loss or a gradient that is not finite does: raise, or skip the step
    report_to: str = "local"  # local: log.csv and curves.png in the output; trackers of Accelerate's; none
    seed: int = 0
    # Before it: print what the run would need, and stop; `processes` says on how many devices
    dry_run: bool = False
    device: str = "a100-40gb"  # one of `training.budget.DEVICES`
    zero_stage: int = 0  # of DeepSpeed; 0 for DDP
    offload: bool = False  # whether DeepSpeed keeps the optimizer's states on the CPU
    peak_share: float = 0.35  # part of the device's peak that the model's own arithmetic is assumed to reach

    def __post_init__(self) -> None:
        check_fields(
            self,
            from_zero=(
                "seed",
                "warmup_steps",
                "chunk_size",
                "processes",
                "workers",
                "image_size",
                "window_size",
                "zero_stage",
            ),
            choices={
                "objective": OBJECTIVES,
                "precision": PRECISIONS,
                "templates": TEMPLATE_KINDS,
                "bad_samples": ("skip", "raise"),
            },
        )
        if self.locked and not self.init_from:
            raise ValueError("locked: expected init_from with a trained image tower, got none")
        if self.streaming and not self.sources:
            raise ValueError("streaming: expected sources to stream, got none")
        if self.leave_out_templated and not self.sources and self.category_batches + self.keyword_batches > 0:
            raise ValueError(
                "leave_out_templated: expected category_batches and keyword_batches of 0, as their texts stand in "
                f"templates, got {self.category_batches} and {self.keyword_batches}"
            )
        if self.seed >= 1 << 31:
            raise ValueError(f"seed: expected less than 2 to the power of 31, got {self.seed}")
        for name in ("category_batches", "keyword_batches", "small_part", "augmentation", "peak_share"):
            if getattr(self, name) > 1:
                raise ValueError(f"{name}: expected a part from 0 to 1, got {getattr(self, name)}")
        if self.category_batches + self.keyword_batches > 1:
            got = self.category_batches + self.keyword_batches
            raise ValueError(f"category_batches and keyword_batches: expected at most 1 together, got {got}")
        if self.ema_decay >= 1:
            raise ValueError(f"ema_decay: expected less than 1, got {self.ema_decay}")
        if self.zero_stage > 3:
            raise ValueError(f"zero_stage: expected 0 to 3, got {self.zero_stage}")
        for name in ("sources", "held_out"):
            if getattr(self, name):
                make_sources(getattr(self, name), name)


__all__ = ["FIXED", "PretrainArguments"]
