"""One healing, end to end: data, student and teacher, training, and the record of it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kvcompile.errors import KvcompileError
from kvcompile.evaluation.heldout import windows
from kvcompile.heal import checkpoints
from kvcompile.heal.budget import Pace
from kvcompile.heal.corpus import Blocks, Windows, corpus, held_out
from kvcompile.heal.lora import inject, merge
from kvcompile.heal.losses import next_token
from kvcompile.heal.optional import needed
from kvcompile.heal.record import HealRecord
from kvcompile.heal.weights import added, fill, flags_kept, own, parameters, projections, train_only
from kvcompile.models.sharing import shared
from kvcompile.plan.plan import Plan, converts
from kvcompile.progress import Progress, no_foreign_bars

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from kvcompile.config.schema import Config, HealConfig
    from kvcompile.heal.trainer import HealTrainer


def require_healable(plan: Plan, heal: HealConfig, tokenizer: Any) -> None:
    """Raise KvcompileError where `repair` could not begin: asked before a weight is converted.

    That is for a `plan` that converts nothing, attentions of a block transformer that are to learn alone, without a
    tokenizer, and without the packages of `kvcompile[heal]`.
    """
    if not converts(plan):
        fix = "add gqa, mqa, cla, mlkv, mla or block_transformer, or heal.tokens=0"
        raise KvcompileError("healing needs a policy that converts weights", "a stack that converts none", fix)
    if plan.blocks is not None and heal.layers and heal.loss == "distill":
        raise KvcompileError(
            "attentions of a block transformer cannot learn alone: they read blocks, the original's read tokens",
            f"heal.layers={heal.layers}",
            "heal.layers=0",
        )
    if tokenizer is None:
        raise KvcompileError("healing needs a tokenizer", "none", "pass tokenizer=")
    needed("accelerate", "healing")


def repair(
    model: Any, original: Any, plan: Plan, config: Config, tokenizer: Any, progress: Progress, folder: Path | None
) -> HealRecord:
    """Train the converted, uncompiled `model` in place, by `config.heal`, towards the `original`.

    Weights that the two share are copied first where they are trained: the original stays what it was. folder: for
    checkpoints (None: none are kept). In a run of many processes only the main one returns; the others are done, and
    exit.
    Raises KvcompileError as `require_healable`, for texts that cannot be read or are too short, and for budgets below
    one step.
    """
    require_healable(plan, config.heal, tokenizer)
    from kvcompile.heal.trainer import arguments

    args = arguments(config.heal, model.device)  # from here on the processes know of each other
    with checkpoints.opened(folder) as place, flags_kept(model), no_foreign_bars():
        args.output_dir = str(place)
        training = Training(model, original, plan, config, tokenizer)
        trainer = training.trainer(args, progress, saves=folder is not None)
        checkpoints.claim(place, checkpoints.fingerprint(config, plan))
        trainer.train(resume_from_checkpoint=checkpoints.newest(place) if config.heal.resume else None)
        record = training.finish(trainer)
    _leave(trainer)
    model.eval()
    return record


class Training:
    """What one training is made of; the student learns with the weights of `model`."""

    def __init__(self, model: Any, original: Any, plan: Plan, config: Config, tokenizer: Any) -> None:
        from kvcompile.adapters.architectures import describe
        from kvcompile.heal.blocks.student import block_student
        from kvcompile.heal.student import Teacher, student

        self.model, self.config, self.heal, self.tokenizer = model, config, config.heal, tokenizer
        self.device = model.device
        self.lora = self.heal.weights == "lora"
        every = self.heal.scope == "all" and not self.lora
        new = added(model)
        names = None if every else [*projections(model, self.heal.scope, self.lora), *new]
        own(model, names)
        base = shared(model)
        if self.lora:
            inject(base, [name for name in names or [] if name not in new], self.heal.rank)
            for parameter in parameters(base, new):
                parameter.requires_grad_(True)
        else:
            train_only(base, names)
        self.pads = plan.blocks.length - 1 if plan.blocks and self.heal.pad_first_block else 0
        learner = student if plan.blocks is None else block_student
        self.student = learner(base, plan, self.heal.hidden, self.heal.temperature)
        self.trained = sum(p.numel() for p in self.student.parameters() if p.requires_grad)
        self.teacher = Teacher(original, describe(original.config, plan.dtype))
        self.text = corpus(self.heal, tokenizer)
        self.windows = Windows(windows(model, held_out(config, tokenizer), config.perplexity), config.perplexity.tokens)

    def trainer(self, args: TrainingArguments, progress: Progress, saves: bool) -> HealTrainer:
        """The trainer, its budget in steps. Raises KvcompileError for texts too short and budgets below one step."""
        from transformers.trainer_callback import PrinterCallback

        from kvcompile.heal.trainer import HealTrainer, QueryHistory

        heal = self.heal
        self.step_tokens = heal.batch * heal.accumulate * heal.length * args.world_size
        args.max_steps = heal.tokens // self.step_tokens
        if args.max_steps < 1:
            fix = f"{self.step_tokens} or more, or a smaller heal.batch"
            raise KvcompileError("heal.tokens must be enough for one step of training", heal.tokens, fix)
        ids = self.text.ids(self.tokenizer, False, heal.tokens + 2 * heal.length)
        distil = heal.loss == "distill"
        count = args.max_steps * self.step_tokens // heal.length
        pace = Pace(args.max_steps, heal.minutes, heal.layers if distil else 0.0)
        trainer = HealTrainer(
            pace,
            heal,
            self.teacher if distil else None,
            model=self.student,
            args=args,
            train_dataset=Blocks(ids, heal.length, count, heal.seed, self.pads),
            eval_dataset=self.windows,
            callbacks=[QueryHistory(pace, heal, progress, saves)],
        )
        trainer.remove_callback(PrinterCallback)
        if self.lora and _sharded(trainer):
            got = "heal.weights=lora under FSDP or DeepSpeed"
            raise KvcompileError(
                "adapters can only be merged into weights that one process holds whole", got, "heal.weights=full"
            )
        return trainer

    def finish(self, trainer: HealTrainer) -> HealRecord:
        """Put what was learned into the model, and tell what that was."""
        points = trainer.points(self.step_tokens)
        dense = self._perplexity(self.teacher.model.to(trainer.args.device))
        if _sharded(trainer):  # the student's parameters are no longer the model's
            fill(self.model, trainer.accelerator.get_state_dict(trainer.model_wrapped))
        elif self.lora:
            merge(self.student)
        self.model.to(self.device)
        measured = [point.perplexity for point in points if point.perplexity is not None]
        heal = self.heal
        return HealRecord(
            loss=heal.loss,
            weights=f"lora, rank {heal.rank}" if self.lora else heal.weights,
            source=self.text.name,
            tokens=points[-1].tokens,
            steps=points[-1].step,
            seconds=round(trainer.pace.elapsed, 1),
            parameters=self.trained,
            perplexity=(dense, measured[0], measured[-1]),
            curve=points,
        )

    @torch.no_grad()
    def _perplexity(self, model: Any) -> float:
        """Of a compiled model, on the held-out windows."""
        losses = []
        for i in range(len(self.windows)):
            row = {name: ids[None].to(model.device) for name, ids in self.windows[i].items()}
            losses.append(next_token(model(row["input_ids"], use_cache=False).logits, row["labels"]))
        return math.exp(torch.stack(losses).mean().item())


def _sharded(trainer: HealTrainer) -> bool:
    return bool(trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled)


def _leave(trainer: HealTrainer) -> None:
    """Of many processes, the main one goes on alone."""
    if trainer.args.world_size > 1:
        main = trainer.is_world_process_zero()
        trainer.accelerator.end_training()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        if not main:
            raise SystemExit(0)
