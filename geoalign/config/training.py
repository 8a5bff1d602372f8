"""Settings of the loop: run folder, groups, optimizer, checkpoints, evaluation, pre-training."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator

from geoalign.config.base import Section

Seed = Annotated[int, Field(ge=0, lt=2**32)]


def _published(why: str) -> dict[str, Any]:
    return {"paper": "published", "why": why}


def _assumed(why: str) -> dict[str, Any]:
    return {"paper": "assumed", "why": why}


class RunConfig(Section):
    """Where a run lives and what makes it reproducible."""

    name: str = "run"
    """Name of the run."""
    dir: Path = Path("runs/{name}")
    """Run folder; ``{name}`` is replaced by the run's name."""
    seed: Seed = 0
    """Seed of every random draw (counter-based: equal on any number of ranks)."""
    threads: int = Field(0, ge=0)
    """Intra-op CPU threads; 0 leaves PyTorch's choice (one thread is fastest for the embedded model)."""
    ranks: Annotated[int, Field(ge=1)] | Literal["auto"] = 1
    """Processes that `geoalign train` starts here; ``auto``: one per usable core, at most one per condition, and one
    where ``run.device`` may be a GPU. Without effect under torchrun, which has started them."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where policy and scorers run; ``auto``: a CUDA device if there is one (each process takes its own)."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the network's matrices; ``auto``: bfloat16 on CUDA, float32 on the CPU. The residual stream, latents,
    log-probabilities and the masters of trained parameters are float32 in either case."""
    wandb: str | None = None
    """Weights & Biases project that gets the metrics too (extra ``wandb``; WANDB_MODE=offline needs no network)."""
    films_every: int = Field(10, ge=0)
    """Iterations between films of a training sample (source, retake, paths asked for and read) under ``films/``, in
    TensorBoard and W&B, beside one of the last iteration; 0: none. One is at most 33 frames of 320 pixels width, below
    15 MB."""
    keep_films: int = Field(20, gt=0)
    """Films kept in the run folder: the first, the newest, and others evenly spaced. TensorBoard and W&B, which keep
    what they get, get this many and half as many again each time the run doubles its length."""
    compile: bool = False
    """Run the network's blocks through ``torch.compile``, one graph for all, in rollout and learner alike."""
    attention: Literal[
        "auto", "measured", "reference", "sdpa_flash", "sdpa_cudnn", "flash2", "flash3", "flash4", "triton"
    ] = "auto"
    """Exact attention core of rollout and learner; ``auto``: the fastest by published rates that is installed here;
    ``measured``: settled by a short measurement before the first iteration, equal on all ranks, kept by checkpoints.
    8-bit attention (``ode.attention``) that does not beat the core is then not used."""
    deterministic: bool = False
    """Make every backward of the network repeat bit for bit on one device, or refuse what cannot; slower on CUDA."""

    @property
    def folder(self) -> Path:
        """The run folder with the name filled in."""
        return Path(str(self.dir).replace("{name}", self.name))


class CodecConfig(Section):
    """Pixels to latents."""

    kind: Literal["patch", "wan_vae"] = "patch"
    """``patch``: fixed orthonormal lapped patch transform (embedded default); ``wan_vae``: the Wan 2.1 VAE."""
    patch: int = Field(16, gt=0, le=256)
    """Patch size of the patch codec in pixels."""
    luma: int = Field(5, gt=0, le=256)
    """Lowest luma coefficients kept per axis and patch."""
    chroma: int = Field(3, gt=0, le=256)
    """Lowest coefficients kept per axis and patch of each colour plane."""


class GroupsConfig(Section):
    """How many conditions and rollouts an iteration has."""

    conditions: int = Field(
        64, gt=0, json_schema_extra=_assumed("not printed; 64 groups of 12, one a GPU, reproduce the 130 hours best")
    )
    """Groups per iteration over all ranks; each is one source clip with one target trajectory."""
    size: int = Field(12, gt=1, json_schema_extra=_published("G = 12"))
    """Rollouts per group, which share condition, initial noise and window."""
    rows_per_forward: int | None = Field(None, gt=0)
    """Largest batch of one network forward; None: the rollouts of one group, so that numbers do not depend on how many
    groups a rank has. 1 is right for long videos: they fill a GPU alone, and memory holds one. Part of what rollout and
    learner share, because batch shapes round apart."""


def compiles(value: str) -> str:
    """``value`` if it is a regular expression; raises ValueError."""
    try:
        re.compile(value)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"not a regular expression: {error}") from error
    return value


class ParameterGroup(Section):
    """Parameters with their own learning rate."""

    pattern: str
    """Regular expression searched in the parameter name; the first group that matches wins."""
    lr: float = Field(gt=0)
    """Peak learning rate."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay."""

    _compiles = field_validator("pattern")(compiles)


class OptimConfig(Section):
    """AdamW over the trained parameters."""

    trainable: str = Field(r"\.self_attn\.", json_schema_extra=_published("only self-attention is updated"))
    """Regular expression: parameters whose name it matches are trained, all others are frozen."""
    lr: float = Field(1e-4, gt=0, json_schema_extra=_published("1e-4, constant"))
    """Learning rate of trained parameters that no group names."""
    groups: tuple[ParameterGroup, ...] = ()
    """Parameter groups with their own learning rates."""
    betas: tuple[float, float] = Field((0.9, 0.999), json_schema_extra=_assumed("library default"))
    """AdamW betas."""
    eps: float = Field(1e-8, gt=0, json_schema_extra=_assumed("library default"))
    """AdamW epsilon; mean-reduced log-probs make gradients small, so small models need a small one."""
    weight_decay: float = Field(1e-4, ge=0, json_schema_extra=_assumed("MixGRPO and its peers"))
    """Decoupled weight decay of the default group."""
    grad_clip: float = Field(1.0, gt=0, json_schema_extra=_assumed("all published peers"))
    """Largest gradient norm."""
    schedule: Literal["constant", "linear"] = Field("constant", json_schema_extra=_published("constant"))
    """``linear`` decays to zero at the last iteration."""
    warmup: int = Field(0, ge=0, json_schema_extra=_assumed("none named"))
    """Iterations of linear warm-up."""
    ema: float = Field(0.0, ge=0, lt=1, json_schema_extra=_assumed("none named"))
    """Decay of the moving average of trained parameters; 0 switches it off. Evaluation and export use the average."""
    updates_per_rollout: int = Field(1, gt=0, json_schema_extra=_assumed("MixGRPO ships 4; 1 is strictly on-policy"))
    """Optimizer updates per iteration; the group's members are split into that many equal parts."""
    states: Literal["float32", "int8"] = "float32"
    """Type of AdamW's moments; ``int8`` (torchao, block-wise scales) saves 6 bytes per trained parameter and CHANGES
    rounding of the updates."""

    _compiles = field_validator("trainable")(compiles)

    @field_validator("betas")
    @classmethod
    def _decays(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in value):
            raise ValueError(f"betas must lie in [0, 1), got {list(value)}")
        return value


class LeversConfig(Section):
    """Exact savings: same algorithm and distribution, rounding aside. Each can be switched off to check or time it."""

    share_prefix: bool = True
    """Compute the steps before the window and its first forward once per group."""
    merge_first_step: bool = True
    """One learner pass per condition at the first window step."""
    streaming: Literal["off", "graphs", "device", "host"] = "off"
    """Start the backward from the rollout's own forwards instead of replaying the window; needs one update per rollout.
    ``graphs`` keeps every window graph until the rewards are known. ``device`` and ``host`` run each backward at once
    and keep one gradient per rollout on the GPU or in page-locked memory; they need ``groups.rows_per_forward`` 1."""
    prune_source: bool = True
    """Skip what the last block would compute for source tokens only."""
    cache_phases: bool = True
    """Keep learned camera phases with the condition for the deterministic steps (4 GB at the paper's size)."""
    recompute: Literal["none", "keep_attention", "full"] = "none"
    """What a block's backward computes again: nothing, all but attention's output and log-sum-exp, or everything."""


TailReuse = Literal["off", "residual", "velocity"]


class OdeConfig(Section):
    """Approximations of the steps after the window: each CHANGES which videos are sampled, by rounding of its kind, and
    leaves the probability ratio unbiased, because no log-probability is taken there. Steps before the window, which a
    group shares, are exact."""

    APPROXIMATE: ClassVar[tuple[str, ...]] = ("attention", "linears", "reuse")
    """Fields that, if they are not at their defaults, make steps approximate."""

    attention: Literal["exact", "int8", "int8_fp8"] = "exact"
    """``int8``: int8 scores, layer by layer where a probe of real inputs finds the error below ``int8_threshold``;
    ``int8_fp8``: and values in fp8 where that stays below it too (compute capability 9.0)."""
    int8_threshold: float = Field(2e-2, gt=0)
    """Relative error of attention's output above which a layer stays exact."""
    linears: Literal["exact", "int8"] = "exact"
    """``int8``: frozen linears with 8-bit weights and activations (torchao)."""
    reuse: TailReuse = "off"
    """Steps after the window that are not evaluated take from the last evaluated one what all blocks together added
    (``residual``), or its velocity. Which steps those are is chosen once, by the drift along an exact tail."""
    reuse_share: float = Field(0.5, gt=0, le=1)
    """Share of the steps after the window that ``reuse`` evaluates, rounded up."""
    reuse_profile: Path | None = None
    """Drift measured by `geoalign fidelity choose`; None: measured in the first iteration, in the first of full length
    after ``learn.short_frames``, and behind a window that ends before all measured ones, by evaluating all steps."""
    audit_every: int = Field(0, ge=0)
    """Iterations between audits, which finish one group exactly as well and log ``fidelity/*``; 0: none. They see what
    the probability ratio cannot: what approximate tails do to the order of a group."""
    audit_spearman: float = Field(0.8, ge=-1, le=1)
    """Smallest rank correlation of the advantages under exact and approximate tail that an audit lets pass."""
    audit_bias: float = Field(3.0, gt=0)
    """Largest change of a reward's group mean, in deviations inside the group, that an audit lets pass."""
    audit_margin: float | None = 10.0
    """Smallest distance, in dB, of the approximate videos' error below the difference between members of the group that
    an audit lets pass; None: any. It varies far less from group to group than a correlation of a few members."""
    audit_action: Literal["stop", "exact", "report"] = "stop"
    """After a bad audit: stop the run before its update, go on with exact tails, or only log it."""

    def audits(self, iteration: int) -> bool:
        """Whether an audit falls on ``iteration``."""
        return self.audit_every > 0 and iteration % self.audit_every == 0

    def evaluated(self, tail_steps: int) -> int:
        """How many of so many steps after the window are evaluated."""
        # The slack undoes the rounding of products such as 20 * 0.3 that fall just above an integer.
        return tail_steps if self.reuse == "off" else max(1, math.ceil(self.reuse_share * tail_steps * (1 - 1e-12)))


class LearnConfig(Section):
    """Cheaper learning: each CHANGES what the updates of a run are made of, and is off by default."""

    window_steps: int | None = Field(None, ge=1)
    """Window steps, drawn at random in every iteration, whose gradients are taken; None: all. The expected gradient is
    that of all steps, its variance is larger."""
    members: int | None = Field(None, ge=1)
    """Members of every group that are learned from: those that could be read with the largest advantages in magnitude,
    then lost ones; None: all. Biased: the other terms are left out."""
    short_frames: int | None = Field(None, ge=2)
    """Frames of the videos in the first ``short_iterations`` iterations; later ones have ``data.num_frames``."""
    short_iterations: int = Field(0, ge=0)
    """Iterations with ``short_frames``."""

    def frames(self, iteration: int, num_frames: int) -> int:
        """Frames of the videos of an iteration."""
        return self.short_frames if self.short_frames and iteration < self.short_iterations else num_frames


class ParallelConfig(Section):
    """How the ranks share the work (``run.ranks`` or torchrun)."""

    engine: Literal["ddp", "deepspeed", "fsdp"] = "ddp"
    """``ddp``: parameters and optimizer on every rank, the fastest at this size. ``deepspeed``: DeepSpeed owns the
    optimizer and shards its state (ZeRO). ``fsdp``: parameters are sharded too (FSDP2), for models that do not fit."""
    zero_stage: Literal[1, 2] = 1
    """``deepspeed``: shard the optimizer state (1), or also the reduced gradients (2)."""
    sequence: int = Field(1, gt=0)
    """Neighbouring ranks that share the tokens of every video (Ulysses, over attention heads); must divide
    ``model.heads``. No faster per GPU: for memory, or for the latency of one long video."""


class TrainConfig(Section):
    """The RL loop."""

    iterations: int = Field(140, gt=0, json_schema_extra=_published("140 iterations"))
    """Iterations to run."""
    base: Path | None = None
    """Policy to start from: a policy file, a run or checkpoint folder, an exported folder, or a folder of published
    weights; ``builtin:tiny_base`` is the embedded default's checkpoint."""
    delta: Path | None = None
    """What was trained on top of published weights: ReDirector's ``step*.safetensors``, or ReCamMaster's ``.ckpt``."""
    max_log_prob_diff: float = Field(1e-6, ge=0)
    """Largest |log-prob(replay) - log-prob(rollout)| before the first update; beyond it the run stops and says why."""
    checkpoint_every: int = Field(10, gt=0)
    """Iterations between checkpoints; the last iteration always writes one."""
    keep_checkpoints: int = Field(2, gt=0)
    """Checkpoints kept in the run folder."""
    async_checkpoints: bool = True
    """Write a checkpoint while the next iteration runs; the copy it writes is taken before."""
    rank_timeout_s: float = Field(3600.0, gt=0)
    """Seconds that a rank waits for the others (they may be evaluating) before the run ends with a message."""
    shuffle_advantages: bool = False
    """Control experiment: permute advantages inside each group, which must remove all learning."""


class EvalConfig(Section):
    """Held-out evaluation before and after training, in Euler steps on the whole time grid, whatever training takes."""

    every: int = Field(0, ge=0)
    """Iterations between evaluations on the way; 0: only before and after."""
    samples: int = Field(40, gt=0)
    """Held-out conditions of each kind (presets, random curves)."""
    noise_seeds: tuple[Seed, ...] = Field((11, 12, 13), min_length=1)
    """Noise seeds; the spread over them is reported."""
    seed: Seed = 777
    """Seed of the held-out scenes and paths."""


class PretrainConfig(Section):
    """Supervised flow matching of the embedded base policy, with mis-scaled labels on purpose."""

    steps: int = Field(1800, gt=0)
    """Optimizer steps."""
    batch: int = Field(32, gt=0)
    """Samples per step."""
    pool: int = Field(5120, gt=0)
    """Rendered pairs that the batches are drawn from."""
    lr: float = Field(2e-3, gt=0)
    """Peak learning rate (cosine decay)."""
    gain_lr: float = Field(6e-3, gt=0)
    """Peak learning rate of the camera gains."""
    bias_mean: tuple[float, float, float, float] = (-0.33, 0.5, -0.36, -0.3)
    """Mean log factor from label to true motion: sideways, forward, vertical, yaw; zeros make an unbiased control."""
    bias_std: tuple[float, float, float, float] = (0.25, 0.25, 0.25, 0.2)
    """Spread of that log factor over videos, per axis."""
    bias_growth: tuple[float, float] = (0.4, 0.8)
    """The log factor is multiplied by the first number plus the second times the progress (0 to 1) over the clip."""
    ema: float = Field(0.995, ge=0, lt=1)
    """Decay of the weight average that becomes the checkpoint."""
