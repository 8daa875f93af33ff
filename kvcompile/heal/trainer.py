"""transformers' Trainer with our losses, budgets and checkpoints: launchers for many devices work as with any other."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments

from kvcompile.heal.budget import Pace
from kvcompile.heal.record import Point
from kvcompile.heal.student import Teacher
from kvcompile.progress import Progress

if TYPE_CHECKING:
    from kvcompile.config.schema import HealConfig


LOGS, EVALUATIONS = 100, 10  # in a whole training


def arguments(heal: HealConfig, device: torch.device) -> TrainingArguments:
    """Arguments of one process, which learns here how many there are; folder and `max_steps` are the caller's."""
    args = TrainingArguments(
        per_device_train_batch_size=heal.batch,
        per_device_eval_batch_size=1,
        gradient_accumulation_steps=heal.accumulate,
        learning_rate=heal.lr or 1.0,
        adam_beta2=0.95,
        max_grad_norm=1.0,
        eval_on_start=True,
        prediction_loss_only=True,
        save_total_limit=1,
        bf16=heal.bf16,
        use_cpu=device.type == "cpu",
        seed=heal.seed,
        disable_tqdm=True,
        report_to="none",
        remove_unused_columns=False,
        label_names=["labels"],
        ddp_find_unused_parameters=True,
        dataloader_pin_memory=device.type == "cuda",
    )
    args._n_gpu = min(1, args.n_gpu)  # several GPUs are a launcher's business, one process each
    return args


class HealTrainer(Trainer):  # type: ignore[misc]
    """Trains a student. The order of the data is the dataset's; the learning rate follows the pace."""

    def __init__(self, pace: Pace, heal: HealConfig, teacher: Teacher | None, **options: Any) -> None:
        super().__init__(**options)
        self.pace, self.heal, self.teacher = pace, heal, teacher
        pace.agree = self._agreed

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **_: Any) -> Any:
        """The loss that the student's forward gives, so that a wrapper of many devices sees the whole pass."""
        if model.training and self.teacher is not None:
            inputs = {**inputs, "targets": self.teacher.targets(inputs["input_ids"], self.pace.stage)}
        outputs = model(**inputs)
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The pace's learning rate, as a factor of the peak."""
        if self.lr_scheduler is None:  # type: ignore[has-type]
            peak = self.args.learning_rate
            rate = self.pace.rate
            self.lr_scheduler = LambdaLR(
                optimizer or self.optimizer, lambda _: rate(self.heal.layers_lr, self.heal.lr) / peak
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As ever, with what a curve needs and a resumed training goes on from."""
        super().log({**logs, "seconds": self.pace.seconds, "stage": self.pace.trained or self.pace.stage}, start_time)

    def points(self, tokens: int) -> list[Point]:
        """The curve so far; `tokens` a step."""
        points = []
        for entry in self.state.log_history:
            if "loss" in entry or "eval_loss" in entry:
                quality = math.exp(min(entry["eval_loss"], 700.0)) if "eval_loss" in entry else None
                step = int(entry["step"])
                at = (step, step * tokens, float(entry["seconds"]), entry["stage"])
                points.append(Point(*at, entry.get("loss"), entry.get("learning_rate"), quality))
        return points

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Tied weights are saved once, which is no reason to warn."""
        once = {name for name, _ in self.model.named_parameters()}
        if load_result.unexpected_keys or once & set(load_result.missing_keys):
            super()._issue_warnings_after_load(load_result)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return SequentialSampler(train_dataset if train_dataset is not None else self.train_dataset)

    def _agreed(self, seconds: float) -> float:
        """The main process's: clocks differ, and all must train the same stage, stop and save together."""
        if self.args.world_size < 2:
            return seconds
        shared = torch.tensor([seconds], device=self.args.device, dtype=torch.float64)
        torch.distributed.broadcast(shared, 0)
        return float(shared)


class QueryHistory(TrainerCallback):  # type: ignore[misc]
    """Keeps the pace: stops at the end of the budget, and says when to log, to measure and to save."""

    def __init__(self, pace: Pace, heal: HealConfig, progress: Progress, saves: bool) -> None:
        self.pace, self.heal, self.progress, self.saves = pace, heal, progress, saves
        self.saved = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Go on from what an earlier session logged last."""
        self.pace.start(max((e.get("seconds", 0.0) for e in state.log_history), default=0.0), state.global_step)
        self.saved = self.pace.elapsed

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Before the scheduler asks for the next learning rate."""
        before = self.pace.fraction
        self.pace.at(state.global_step + 1)
        changed = self.pace.trained != self.pace.stage  # losses of two stages must not be averaged
        self.log_due = changed or math.floor(before * LOGS) < math.floor(self.pace.fraction * LOGS)
        self.measure_due = math.floor(before * EVALUATIONS) < math.floor(self.pace.fraction * EVALUATIONS)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """After a step."""
        due = self.saves and self.pace.elapsed - self.saved >= 60 * self.heal.checkpoint_minutes
        control.should_save = due or (self.saves and self.pace.spent)
        control.should_evaluate = self.measure_due or self.pace.spent
        control.should_log = self.log_due or control.should_save or control.should_evaluate
        control.should_training_stop = self.pace.spent
        if control.should_save:
            self.saved = self.pace.elapsed
        self.progress("healing", int(1000 * self.pace.fraction), 1000)
