"""The proof that a compile ends with: what each layer and head holds, and what that did to quality and speed."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kvcompile.errors import KvcompileError
from kvcompile.evaluation.needle import NeedleRecord, NeedleResult
from kvcompile.evaluation.proof import LayerRow
from kvcompile.evaluation.speed import Comparison, Speed
from kvcompile.heal.record import HealRecord

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class Report:
    """Everything measured in one compile, as plain data.

    tokens: length of the prompt after which the layers were measured. planned_total: tokens planned for all layers
    whose split depends on the input. needle (question seen), needle_hidden, perplexity, parameters: (uncompressed,
    compiled). speed: the first is uncompressed, the last compiled. kernels, passes: what runs in which layer, how often
    each pass rewrote the graph. decode_step: which layers run fused around their attention. weights: what they were
    rounded to. exports: bytes by exporter and file.
    """

    title: str
    model: str
    recipe: str
    policies: list[str]
    tokens: int
    rows: list[LayerRow]
    planned_total: int | None = None
    machine: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    kernels: list[str] = field(default_factory=list)
    passes: dict[str, int] = field(default_factory=dict)
    decode_step: str = ""
    weights: str = ""
    needle: tuple[NeedleResult, NeedleResult] | None = None
    needle_hidden: tuple[NeedleResult, NeedleResult] | None = None
    speed: Comparison | None = None
    perplexity: tuple[float, float] | None = None
    parameters: tuple[int, int] | None = None
    healed: HealRecord | None = None
    exports: dict[str, dict[str, int]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    @property
    def bytes_held(self) -> int:
        """Bytes of keys and values measured in the live cache."""
        return sum(row.bytes for row in self.rows)

    @property
    def host_bytes(self) -> int:
        """What of these was found in host memory."""
        return sum(row.host_bytes for row in self.rows)

    @property
    def index_bytes(self) -> int:
        """Bytes of what stands for groups of tokens, beside keys and values."""
        return sum(row.index_bytes for row in self.rows)

    @property
    def device_bytes(self) -> int:
        """Bytes on the device between tokens: keys and values that are not in host memory, and the index."""
        return self.bytes_held - self.host_bytes + self.index_bytes

    @property
    def read_bytes(self) -> int:
        """Bytes that the next decode step read, index included."""
        return sum(row.read for row in self.rows)

    @property
    def dense_bytes(self) -> int:
        """Bytes of the uncompressed cache."""
        return sum(row.dense_bytes for row in self.rows)

    @property
    def dense_read(self) -> int:
        """Bytes that a decode step reads of the uncompressed cache."""
        return sum(row.dense_read for row in self.rows)

    @property
    def cluster_recall(self) -> float | None:
        """Of the tokens that queries score highest, the share that steps read, mean over the layers with a choice."""
        shares = [row.cluster_recall for row in self.rows if row.cluster_recall is not None]
        return sum(shares) / len(shares) if shares else None

    @property
    def recalls(self) -> bool:
        """Whether some layer chooses what each step reads."""
        return any(row.recalls for row in self.rows)

    @property
    def per_token(self) -> tuple[int, int]:
        """Bytes of cache a prompt token, over all layers, on average: (uncompressed, compiled)."""
        return round(self.dense_bytes / max(1, self.tokens)), round(self.bytes_held / max(1, self.tokens))

    def to_json(self) -> dict[str, Any]:
        """Plain dict: the fields, and their `summary`."""
        return {**dataclasses.asdict(self), "summary": summary(self)}

    @staticmethod
    def from_json(data: dict[str, Any]) -> Report:
        """The report that `to_json` wrote. Raises KvcompileError for anything else."""
        try:
            fields = {name: value for name, value in data.items() if name != "summary"}
            fields["rows"] = [LayerRow(**row) for row in fields["rows"]]
            for pair in ("needle", "needle_hidden"):  # a report of before has no needle_hidden
                if fields.get(pair) is not None:
                    fields[pair] = tuple(
                        NeedleResult(tuple(NeedleRecord(**r) for r in n["records"])) for n in fields[pair]
                    )
            if fields["speed"] is not None:
                speeds = {name: Speed(**speed) for name, speed in fields["speed"]["speeds"].items()}
                fields["speed"] = Comparison(**{**fields["speed"], "speeds": speeds})
            for pair in ("perplexity", "parameters"):
                if fields[pair] is not None:
                    fields[pair] = tuple(fields[pair])
            if fields["healed"] is not None:
                fields["healed"] = HealRecord.from_json(fields["healed"])
            return Report(**fields)
        except (AttributeError, KeyError, TypeError) as error:
            raise KvcompileError(
                "the file must be a report of this version of kvcompile", f"{type(error).__name__}: {error}"
            ) from error


def summary(report: Report) -> dict[str, float | int | str | None]:
    """The numbers that a summary of many compiles shows; None where not measured."""
    needle, perplexity = report.needle or (None, None), report.perplexity or (None, None)
    hidden = report.needle_hidden or (None, None)
    parameters = report.parameters or (None, None)
    speeds = list(report.speed.speeds.values()) if report.speed else [None]
    before, after = speeds[0], speeds[-1]
    return {
        "tokens": report.tokens,
        "bytes": report.bytes_held,
        "dense_bytes": report.dense_bytes,
        "device_bytes": report.device_bytes,
        "host_bytes": report.host_bytes,
        "read_bytes": report.read_bytes,
        "kept": report.bytes_held / report.dense_bytes if report.dense_bytes else None,
        "read": report.read_bytes / report.dense_read if report.dense_read else None,
        "cluster_recall": report.cluster_recall,
        "bytes_per_token_before": report.per_token[0],
        "bytes_per_token_after": report.per_token[1],
        "parameters_before": parameters[0],
        "parameters_after": parameters[1],
        "needle_before": needle[0].mean if needle[0] else None,
        "needle_after": needle[1].mean if needle[1] else None,
        "needle_hidden_before": hidden[0].mean if hidden[0] else None,
        "needle_hidden_after": hidden[1].mean if hidden[1] else None,
        "perplexity_before": perplexity[0],
        "perplexity_after": perplexity[1],
        "perplexity_converted": report.healed.perplexity[1] if report.healed else None,
        "prefill_s_before": before.prefill_s if before else None,
        "prefill_s_after": after.prefill_s if after else None,
        "decode_tokens_s_before": before.decode_tokens_s if before else None,
        "decode_tokens_s_after": after.decode_tokens_s if after else None,
    }
