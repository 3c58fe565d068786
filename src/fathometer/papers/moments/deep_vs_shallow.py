"""Do very deep transformers train once their moments are held at one? Byte-level language models on real text.

DeepScaleLM against Xavier weights and GPT-2's, post-norm and pre-norm, the next byte and hidden bytes, over depth: the
same embeddings, head, windows, rates and steps for all. Then thin and deep against wide and shallow with equally many
weights in their blocks, both by DeepScaleLM.

The mark is the loss of the symbols' frequencies, which the head's bias holds from the start: a run has *learned* if it
ends a tenth of a nat below. GPT-2's deviation of 0.02 is that of width 768; at another width it is taken as
``0.02 sqrt(768 / d_model)``, a choice, since 0.02 at width 16 would leave the blocks idle.

Finished runs are kept and not repeated. What the paper trained, and for how long, is not reproduced: sizes, text and
steps are ours, and nothing is claimed beyond these runs. GPT-2's weights are weakened with depth as DeepScaleLM's
branches are; at the small size they learn faster than either.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fathometer._version import __version__
from fathometer.papers.item import Cell, Progress, Size, Table, plain, silent
from fathometer.spec import LayerNorm, Placement, Scales, Sublayer, Transformer

if TYPE_CHECKING:
    from fathometer.training.comparison import TrainingComparison
    from fathometer.training.language import LanguageRun
    from fathometer.training.text import ByteText

PLACEMENTS: dict[str, Placement] = {"post-norm": Sublayer.post_norm, "pre-norm": Sublayer.pre_norm}
DEEPSCALELM = "deepscalelm"
LABELS = {DEEPSCALELM: "DSLM", "xavier": "Xavier", "gpt2": "GPT-2"}
HEAD_MULTIPLIER = 8.0
RUNS = Path("fathometer-reproduce") / "moments-deep-vs-shallow" / "runs"


@dataclass(frozen=True, kw_only=True)
class Study:
    """One comparison of schemes over depth.

    Args:
        objective: ``"causal"`` or ``"masked"``.
        placement: ``"post-norm"`` or ``"pre-norm"``.
        d_model: Width.
        depths: Numbers of blocks.
        schemes: Names of schemes.
    """

    objective: str
    placement: str
    d_model: int
    depths: tuple[int, ...]
    schemes: tuple[str, ...] = (DEEPSCALELM, "xavier", "gpt2")


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """What is trained.

    Args:
        studies: Schemes over depth.
        shapes: Deep and thin against shallow and wide: studies of one depth and scheme each, in pairs.
        d_head, n_tokens, batch_size, steps, warmup, rates, seeds: Of every run.
        together: Whether the runs of a depth are trained as one stack.
    """

    studies: tuple[Study, ...]
    shapes: tuple[Study, ...]
    d_head: int
    n_tokens: int
    batch_size: int
    steps: int
    warmup: int
    rates: tuple[float, ...]
    seeds: int
    together: bool


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A study and what came of it."""

    study: Study
    runs: TrainingComparison

    @property
    def name(self) -> str:
        """Objective and placement."""
        return f"{self.study.objective}, {self.study.placement}"


@dataclass(frozen=True, kw_only=True)
class DeepVsShallow:
    """Training runs over schemes, depths, rates and seeds.

    Attributes:
        studies: Schemes over depth.
        shapes: Shapes with equally many weights, in pairs of deep and thin, shallow and wide.
        about: Protocol and version.
    """

    studies: tuple[Trained, ...]
    shapes: tuple[Trained, ...]
    about: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return {"schema": 1, **plain(self)}

    def table(self) -> Table:
        """Return a row for every scheme and depth."""
        rows: list[tuple[Cell, ...]] = []
        for trained in (*self.studies, *self.shapes):
            runs = trained.runs
            mean, error = runs.at_best_rate()
            best, stable, learning = runs.best_rate(), runs.largest_stable_rate(), runs.largest_learning_rate()
            for i, scheme in enumerate(runs.schemes):
                for j, depth in enumerate(runs.depths):
                    k = best[i, j]
                    spread = float(error[i, j]) if math.isfinite(error[i, j]) else None
                    rows.append(
                        (
                            f"{trained.name.removesuffix('-norm').replace(',', '')} {depth}x{trained.study.d_model}",
                            LABELS[scheme],
                            (float(mean[i, j]), spread),
                            f"{runs.rates[k]:g}",
                            f"{int(runs.learned[i, j, k].sum())}/{len(runs.seeds)}",
                            f"{learning[i, j]:g}" if learning[i, j] else "none",
                            f"{stable[i, j]:g}" if stable[i, j] else "none",
                            f"{1e3 * runs.seconds_per_step[i, j].mean():.0f}",
                        )
                    )
        return Table(
            title="Held-out loss less that of the frequencies, nats, at the rate of lowest training loss; n: seeds "
            "that learned there; the largest rates all seeds learned at, and were stable at; ms: of a network's step",
            headings=("network", "scheme", "loss", "rate", "n", "learn", "stable", "ms"),
            rows=tuple(rows),
        )


class RunFolder(MutableMapping[str, "LanguageRun"]):
    """Finished runs as one file each, written in one step; a file that cannot be read counts as missing.

    Args:
        folder: Where; created when the first run is kept.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __getitem__(self, key: str) -> LanguageRun:
        """Return a run, or raise ``KeyError``."""
        from fathometer.errors import SpecError
        from fathometer.training.language import LanguageRun

        try:
            return LanguageRun.from_dict(json.loads(self._path(key).read_text(encoding="utf-8")))
        except (OSError, ValueError, LookupError, TypeError, AttributeError, SpecError):
            raise KeyError(key) from None

    def __setitem__(self, key: str, run: LanguageRun) -> None:
        """Keep a run."""
        from fathometer.results.files import write_atomically

        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self._path(key), run.to_json().encode())

    def __delitem__(self, key: str) -> None:
        """Forget a run."""
        try:
            self._path(key).unlink()
        except FileNotFoundError:
            raise KeyError(key) from None

    def __iter__(self) -> Iterator[str]:
        """Yield the keys, sorted."""
        return iter(sorted(path.stem for path in self.folder.glob("*.json")))

    def __len__(self) -> int:
        """Return the number of runs."""
        return sum(1 for _ in self)

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.json"


def deep_vs_shallow(size: Size, progress: Progress = silent) -> DeepVsShallow:
    """Train what belongs to a size; finished runs are kept in ``fathometer-reproduce/moments-deep-vs-shallow/runs``.

    Args:
        size: Below a ``d_model`` of 512 minutes on one core, of widths 16 and 64. From there on
            the large protocol: 192 blocks of width ``d_model / 4`` against 12 of ``d_model``, and 1000 thin ones,
            meant for a GPU, which is used where torch finds one. Its ``seeds``, at most 3.
        progress: Told about every step.
    """
    from fathometer.training.text import byte_text

    protocol = small_protocol(min(size.seeds, 2)) if size.d_model < 512 else large_protocol(size)
    return run(protocol, byte_text(), RunFolder(RUNS), progress)


def small_protocol(seeds: int) -> Protocol:
    """Return the protocol of minutes on one core."""
    thin, wide = 16, 64
    return Protocol(
        studies=(
            Study(objective="causal", placement="post-norm", d_model=thin, depths=(12, 48, 192)),
            Study(objective="causal", placement="pre-norm", d_model=thin, depths=(12, 48)),
            Study(objective="masked", placement="post-norm", d_model=thin, depths=(12, 48)),
            Study(objective="masked", placement="pre-norm", d_model=thin, depths=(12, 48)),
        ),
        shapes=_shapes(("post-norm",), thin, wide),
        d_head=8,
        n_tokens=32,
        batch_size=4,
        steps=200,
        warmup=20,
        rates=(3e-4, 1e-3),
        seeds=seeds,
        together=True,
    )


def large_protocol(size: Size) -> Protocol:
    """Return the protocol for a GPU."""
    thin, wide = size.d_model // 4, size.d_model
    return Protocol(
        studies=(
            *(
                Study(objective=objective, placement=placement, d_model=thin, depths=(12, 48, 192))
                for objective in ("causal", "masked")
                for placement in PLACEMENTS
            ),
            *(
                Study(objective="causal", placement=placement, d_model=thin, depths=(1000,), schemes=(DEEPSCALELM,))
                for placement in PLACEMENTS
            ),
        ),
        shapes=_shapes(tuple(PLACEMENTS), thin, wide),
        d_head=64,
        n_tokens=256,
        batch_size=32,
        steps=1000,
        warmup=100,
        rates=(1e-4, 3e-4, 1e-3),
        seeds=min(size.seeds, 3),
        together=False,
    )


def run(
    protocol: Protocol, text: ByteText, runs: MutableMapping[str, LanguageRun], progress: Progress = silent
) -> DeepVsShallow:
    """Train what a protocol says and is not yet among the finished runs."""
    everything = (*protocol.studies, *protocol.shapes)
    trained = []
    for number, study in enumerate(everything, 1):

        def told(label: str, done: int, total: int, at: str = f"part {number} of {len(everything)}") -> None:
            progress(f"{at}: {label}", done, total)

        trained.append(Trained(study=study, runs=_train(study, protocol, text, runs, told)))
    split = len(protocol.studies)
    return DeepVsShallow(
        studies=tuple(trained[:split]),
        shapes=tuple(trained[split:]),
        about={
            "paper": "arXiv:2403.09635",
            "text": text.name,
            "unigram_loss": text.unigram_loss,
            "unigram_entropy": text.unigram_entropy,
            "d_head": protocol.d_head,
            "n_tokens": protocol.n_tokens,
            "batch_size": protocol.batch_size,
            "steps": protocol.steps,
            "warmup": protocol.warmup,
            "rates": list(protocol.rates),
            "seeds": protocol.seeds,
            "optimizer": "adamw",
            "version": __version__,
        },
    )


def block_weights(study: Study) -> int:
    """Return the number of weights in the blocks of the deepest network of a study."""
    return 12 * max(study.depths) * study.d_model**2


def architecture(study: Study, *, d_head: int) -> Transformer:
    """Return the blocks of a study, one deep, at unit scales."""
    scales = Scales(query=1.0, key=1.0, value=1.0, output=1.0, mlp_in=1.0, mlp_out=1.0)
    return Transformer.uniform(
        n_layers=1,
        d_model=study.d_model,
        n_heads=max(1, study.d_model // d_head),
        norm=LayerNorm(),
        activation="relu",
        scales=scales,
        causal=study.objective == "causal",
        placement=PLACEMENTS[study.placement],
    )


def _shapes(placements: tuple[str, ...], thin: int, wide: int) -> tuple[Study, ...]:
    return tuple(
        Study(objective="causal", placement=placement, d_model=d_model, depths=(n_layers,), schemes=(DEEPSCALELM,))
        for placement in placements
        for n_layers, d_model in ((12 * (wide // thin) ** 2, thin), (12, wide))
    )


def _train(
    study: Study, protocol: Protocol, text: ByteText, runs: MutableMapping[str, LanguageRun], progress: Progress
) -> TrainingComparison:
    import torch

    from fathometer.training.comparison import compare_training
    from fathometer.training.language import language_network

    options: dict[str, Mapping[str, Any]] = {name: {} for name in study.schemes}
    if "gpt2" in options:
        options["gpt2"] = {"std": 0.02 * math.sqrt(768 / study.d_model)}
    return compare_training(
        architecture(study, d_head=protocol.d_head),
        text,
        objective=study.objective,
        schemes=options,
        depths=study.depths,
        rates=protocol.rates,
        seeds=range(protocol.seeds),
        steps=protocol.steps,
        n_tokens=protocol.n_tokens,
        batch_size=protocol.batch_size,
        warmup=protocol.warmup,
        around=partial(language_network, head_multiplier=HEAD_MULTIPLIER),
        together=protocol.together,
        recompute=not protocol.together,
        device="cpu" if protocol.together or not torch.cuda.is_available() else "cuda",
        runs=runs,
        progress=progress,
    )
