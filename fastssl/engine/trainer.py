"""The training loop."""

import math
import signal
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastssl.data import augmentation as aug
from fastssl.data.identity import identity
from fastssl.data.loader import Loader, make_loader
from fastssl.data.loading import Loading
from fastssl.data.order import mixed_seed
from fastssl.engine import agreement, alarms
from fastssl.engine.build import build_method, build_source, load_weights
from fastssl.engine.checkpoint import changes, check_data, check_fits, load
from fastssl.engine.config import Config, check, images_a_process, to_dict, to_yaml
from fastssl.engine.device import autocast_dtype, be_deterministic, keep_freed_memory, select_device
from fastssl.engine.feed import Feed, Stop
from fastssl.engine.interrupt import Interrupt
from fastssl.engine.logger import RunLogger, Silence
from fastssl.engine.optimizers import make_optimizer
from fastssl.engine.run_folder import RunFolder, of_this_job, open_run_folder, read_metrics
from fastssl.engine.schedules import learning_rate, peak
from fastssl.engine.step import TrainingStep
from fastssl.engine.team import Team
from fastssl.engine.window import Window
from fastssl.errors import DataError, FastsslError
from fastssl.evaluation.evaluator import Evaluator
from fastssl.evaluation.report import Result, neighbours, table, write_report


class Trainer:
    """One training from its configuration to its report.

    Args:
        config: what to train, on what, where to write.
        name: of the run, for the default run folder.
        team: this process among those that train together; all construct a Trainer of the same configuration.

    Raises:
        FastsslError: something in the configuration, the data or the output folder is wrong; nothing has been trained.
    """

    def __init__(self, config: Config, name: str, team: Team | None = None) -> None:
        check(config)
        self.config = config
        self.team = team or Team(select_device(config.gpus))
        self.device = self.team.device
        self.dtype = autocast_dtype(config.precision, self.device)
        if self.device.type == "cpu":
            keep_freed_memory()
        torch.backends.cudnn.benchmark = not config.deterministic
        if config.deterministic:
            be_deterministic()
        augmentation = aug.load(config.augmentation)
        loading = Loading(
            config.loader, config.color, self.device, self.dtype or torch.float32,
            workers=min(8, torch.get_num_threads()) if config.workers is None else config.workers,
            prefetch=config.prefetch, seed=config.seed, rank=self.team.rank, world=self.team.world,
            last_batch=config.last_batch,
        )  # fmt: skip
        source = build_source(config, augmentation)
        self.loader: Loader = make_loader(
            source.train, augmentation, images_a_process(config, self.team.world), loading
        )
        self.data = {**identity(source.train, augmentation), **self.loader.executor}
        self.evaluator = Evaluator(
            source, augmentation, self.device, self.dtype, k=config.knn_k, temperature=config.knn_temperature,
            bank_images=config.knn_images, loading=loading,
        )  # fmt: skip
        self.total_steps = config.steps or max(1, round(config.epochs * len(self.loader)))
        if config.warmup_epochs * len(self.loader) >= self.total_steps:
            raise FastsslError(
                f"warmup_epochs {config.warmup_epochs:g} ({len(self.loader)} steps each) leaves nothing of the "
                f"{self.total_steps} steps"
            )
        self.step = 0
        self.seconds = 0.0  # of training alone, without evaluations and checkpoints
        self.method = self._place(build_method(config, self.total_steps, self.team.world))
        self.optimizer = make_optimizer(self.method, config, apex=config.apex)
        self.train_step = TrainingStep(config, self.method, self.optimizer, self.device, self.dtype)
        self.alarms = alarms.Alarms(
            negatives=getattr(config, "queue_size", None),
            directions=1 + getattr(config, "symmetric", False),
            nonfinite_limit=config.nonfinite_limit,
            loss_scaled=self.dtype is torch.float16,
        )
        self.rate: Callable[[int], float] = learning_rate(config, len(self.loader), self.total_steps)
        self.window = Window()
        self.last = (math.nan, 0.0)  # loss and images/s as logged last
        self.reason: str | None = None  # to end early
        self.notes: list[tuple[str, bool]] = []  # to be said at the start; True: a warning
        state = self._open(name)
        step = 0 if state is None else state["step"]
        torch.manual_seed(mixed_seed(config.seed, "training", self.team.rank, step))
        if state is not None:
            self._restore(state)

    def fit(self) -> int:
        """Train to the end and write the report; returns 0, or 128 + the signal that asked to stop."""
        with Interrupt(patient=self.team.world > 1) as interrupt, self._logger() as log:
            self._announce(log)
            if self.config.compile:
                for network in self.method.children():
                    network.compile()
            if self.step == 0:
                self._evaluate(log)
            while self.step < self.total_steps:
                try:
                    self._epoch(interrupt, log)
                except Stop as stop:
                    return self._stop(stop, log)
            if (reason := self.team.share(self.reason)) is not None:
                raise FastsslError(reason)  # of the last steps; they are saved
            self._finish(log)
        return 0

    def _epoch(self, interrupt: Interrupt, log: RunLogger | Silence) -> None:
        """From the present step to the end of its epoch or of the training.

        Raises:
            Stop: a process has to end; all of them stop after the same step.
        """
        steps = len(self.loader)
        self.method.train()
        with closing(self.loader.batches(*divmod(self.step, steps))) as batches:
            feed = Feed(batches, self.team, lambda: (interrupt.requested or 0, self.reason is not None))
            self.window.start()
            for views in feed:
                self.window.add(self.train_step(views, self.rate(self.step)))
                self.step += 1
                self._after_step(feed, log)
                if self.step == self.total_steps:
                    return

    def _after_step(self, feed: Feed, log: RunLogger | Silence) -> None:
        """What is due after this step: metrics, checks, evaluation, checkpoint."""
        config, last = self.config, self.step == self.total_steps
        evaluate = last or bool(config.knn_epochs and self._due(config.knn_epochs))
        if evaluate or self.step % config.log_steps == 0:
            self._log(feed, log)
        if config.queue_check_steps and (last or self.step % config.queue_check_steps == 0):
            agreement.check(self.team, self.method, self.step)
        if self.reason is None and 0 < config.nonfinite_limit <= self.train_step.skipped_in_a_row:
            self.reason = (
                f"no finite gradients in {self.train_step.skipped_in_a_row} steps up to {self.step}: lower --lr (now "
                f"{self.rate(self.step - 1):g}) or lengthen --warmup_epochs"
            )
        with self.window.paused():
            if evaluate:
                self._evaluate(log)  # before the checkpoint: a run that goes on from it does not do it again
            due = self.step % (config.checkpoint_steps or len(self.loader)) == 0
            if last or due or (config.milestone_epochs and self._due(config.milestone_epochs)):
                self._save(log, last)

    def _due(self, epochs: float) -> bool:
        """Whether a whole number of `epochs` has just passed."""
        return self.step % max(1, round(epochs * len(self.loader))) == 0

    def _log(self, feed: Feed, log: RunLogger | Silence) -> None:
        total, finite, steps, elapsed = self.window.close()
        self.seconds += elapsed
        own, feed.seconds = feed.seconds / max(1, steps) + self.train_step.backward_seconds(), 0.0
        rows = self.team.numbers([total, finite, own])
        count = sum(row[1] for row in rows)
        epoch, speed = self.step / len(self.loader), steps * self.config.batch_size / elapsed
        metrics = {
            "epoch": epoch, "lr": self.rate(self.step - 1), "momentum": float(self.method.momentum),
            "images_per_second": speed, "seconds": self.seconds, "skipped": self.train_step.skipped,
        }  # fmt: skip
        if count:  # otherwise no step of the window had a finite loss
            metrics["loss"] = math.fsum(row[0] for row in rows) / count
        self.last = (metrics.get("loss", math.nan), speed)
        if not self.team.leads:
            return
        metrics |= alarms.health(self.method)
        log.metrics(self.step, **metrics)
        log.progress(self.step, epoch=f"{epoch:.1f}", loss=f"{self.last[0]:.3f}", speed=f"{speed:,.0f}")
        seen = {
            **metrics,
            "step_seconds": elapsed / max(1, steps),
            "skipped_in_a_row": self.train_step.skipped_in_a_row,
            "loss": self.last[0],
        }
        for alarm in self.alarms.check(self.step, epoch, seen, [row[2] for row in rows]):
            log.say(f"ALARM {alarm.name} at step {self.step}: {alarm.text}", warning=True)
            log.metrics(self.step, **{f"alarm/{alarm.name}": 1.0})
            if alarm.name in self.config.stop_on:
                self.reason = f"stopped by the alarm {alarm.name}, as --stop_on says: {alarm.text}"

    def _evaluate(self, log: RunLogger | Silence) -> None:
        """The kNN accuracy, by process 0; the others wait."""
        if self.team.leads:
            epoch = f"epoch {self.step / len(self.loader):5.1f}"
            if self.step:
                epoch += "  loss {:.3f}  {:,.0f} images/s".format(*self.last)
            if self.config.knn_epochs and not self.evaluator.cannot_knn:
                try:
                    knn = self.evaluator.knn(self.method.backbone)
                except DataError as error:
                    self.reason = str(error)
                else:
                    assert knn is not None
                    log.metrics(self.step, epoch=self.step / len(self.loader), knn=knn, seconds=self.seconds)
                    log.progress(self.step, knn=f"{knn:.1%}")
                    log.say(f"{epoch}  kNN {knn:.1%}")
            elif self.step:
                log.say(epoch)
        self.team.wait()

    def _save(self, log: RunLogger | Silence, last: bool) -> None:
        """Write a checkpoint; the training goes on meanwhile, and if it cannot be written."""
        state = self._state()
        if not self.team.leads:
            return
        try:
            self.run.checkpoints.save_later(state)
        except FastsslError as error:  # of the one before
            log.say(f"{error}; training goes on", warning=True)  # a full disk may be emptied before the next one
        if last:
            self.run.checkpoints.finish()

    def _stop(self, stop: Stop, log: RunLogger | Silence) -> int:
        """Save, say why, and return the exit code, or raise if it is an error."""
        reasons = self.team.gather(str(stop.error) if stop.error else self.reason)
        state = self._state()
        if self.team.leads:
            with suppress(FastsslError):  # an older one, which is of no use any more
                self.run.checkpoints.finish()
            path = self.run.checkpoints.save(state)
            cause = signal.Signals(stop.signal).name if stop.signal else "ended early"
            log.say(f"{cause}: saved {path} at step {self.step}; go on with --resume auto --output {self.run.path}")
        self.team.wait()
        if stop.failed:
            kind = DataError if self.team.gather(stop.error is not None).count(True) else FastsslError
            raise kind(next(reason for reason in reasons if reason is not None))
        return 128 + stop.signal

    def _finish(self, log: RunLogger | Silence) -> None:
        if self.team.leads:
            assert isinstance(log, RunLogger)
            log.say("measuring raw pixels, the random initialisation and the trained network")
            random = self._place(build_method(self.config, self.total_steps))
            backbones: dict[str, nn.Module | None] = {
                "raw pixels": None, "random initialisation": random.backbone, "trained": self.method.backbone
            }  # fmt: skip
            results = [Result(name, self.evaluator.measure(backbone)) for name, backbone in backbones.items()]
            write_report(
                self.run.report,
                title=f"{self.config.method} on {self.evaluator.source.name}",
                config=to_yaml(self.config),
                metrics=read_metrics(self.run.metrics),
                results=results,
                grid=neighbours(self.evaluator, self.method.backbone),
            )
            log.console.print(table(results))
            log.say(f"{self.total_steps} steps, {self.seconds:.0f} s of training; report: {self.run.report}")
        self.team.wait()

    def _announce(self, log: RunLogger | Silence) -> None:
        for note, warning in self.notes:
            log.say(note, warning)
        source, world = self.evaluator.source, self.team.world
        images = f"{len(source.train):,} images"
        if source.test is not None:
            images += f", {len(source.test):,} held out"
        batch = f"{self.config.batch_size}" + (f" ({self.config.batch_size // world} a process)" if world > 1 else "")
        where = f"{world} processes, each on a {self.device.type}" if world > 1 else str(self.device)
        log.say(
            f"{self.config.method} with {self.config.backbone} on {source.name}: {images}, {self.total_steps} steps of "
            f"{batch} on {where} in {self.dtype or torch.float32}, views by {self.loader.executor['loader']}, "
            f"learning rate {peak(self.config):g}"
        )
        log.say(f"run folder: {self.run.path}")
        if self.config.knn_epochs and self.evaluator.cannot_knn:
            log.say(f"no kNN accuracy: {self.evaluator.cannot_knn}")

    def _logger(self) -> RunLogger | Silence:
        return RunLogger(self.run, self.total_steps, self.step) if self.team.leads else Silence()

    def _place(self, method: Any) -> Any:
        if self.config.channels_last:
            method = method.to(memory_format=torch.channels_last)
        return method.to(self.device)

    def _state(self) -> dict[str, Any]:
        """What a checkpoint holds; all processes must call it, process 0 gets it whole."""
        own: dict[str, Any] = {"cpu": torch.get_rng_state(), "losses": self.window.losses()}
        if self.device.type == "cuda":
            own["cuda"] = torch.cuda.get_rng_state(self.device)
        processes = self.team.gather(own)
        if not self.team.leads:
            return {}
        return {
            "method": self.config.method, "config": to_dict(self.config), "model": self.method.state_dict(),
            "optimizer": self.optimizer.state_dict(), "training_step": self.train_step.state_dict(),
            "alarms": self.alarms.state_dict(), "step": self.step, "total_steps": self.total_steps,
            "seconds": self.seconds, "data": self.data, "world": self.team.world, "processes": processes,
        }  # fmt: skip

    def _open(self, name: str) -> dict[str, Any] | None:
        """Open the run folder, and read the checkpoint to go on from, if there is one; process 0 does it for all."""
        agreement.check_start(self.team, to_dict(self.config), self.data)

        def opened() -> Any:
            try:
                config = of_this_job(self.config, name, self.team.job) if self.team.restarts else self.config
                self.run = open_run_folder(config, name)
                state = self._checkpoint(config.resume)
                self.run.prepare(self.config, state["step"] if state else 0, self.team.job)
                return self.run.path, state
            except FastsslError as error:
                return error

        path, state = self.team.share(opened() if self.team.leads else None)
        if not self.team.leads:
            self.run = RunFolder(path)
        self.run.checkpoints.milestones = round(self.config.milestone_epochs * len(self.loader))
        return state

    def _checkpoint(self, resume: str) -> dict[str, Any] | None:
        """The state to go on from, if there is one and it fits."""
        if self.team.restarts:
            died_of = self.team.died_of or "a process that died without a word"
            self.notes.append((f"restart {self.team.restarts}, after {died_of}", True))
        found = self.run.checkpoints.newest() if resume == "auto" else None
        if found is not None:
            path, state, complaints = found
            self.notes += [(complaint, True) for complaint in complaints]
        elif self.config.resume in ("never", "auto"):
            return None
        else:
            path = Path(self.config.resume)
            state = load(path)
        check_fits(path, state, self.config)
        check_data(path, state["data"], self.data)
        self.notes.append((f"resumed from {path} at step {state['step']}", False))
        for name, (there, here) in changes(state, self.config).items():
            self.notes.append((f"{name} was {there} and is {here} from here on", True))
        if state["world"] != self.team.world:
            self.notes.append(
                (
                    f"{state['world']} processes were training and {self.team.world} are from here on: the same images "
                    "in the same batches, but other augmentations and batch statistics, so not bit for bit",
                    True,
                )
            )
        return state

    def _restore(self, state: dict[str, Any]) -> None:
        load_weights(self.method, state)
        options = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, own in zip(self.optimizer.param_groups, options, strict=True):
            group.update(own)  # weight decay and the like are the configuration's, not the checkpoint's
        self.train_step.load_state_dict(state["training_step"])
        if 0 < self.config.nonfinite_limit <= self.train_step.skipped_in_a_row:
            self.train_step.skipped_in_a_row = 0  # it ended with that; whoever goes on wants to see it again
        else:
            self.alarms.load_state_dict(state["alarms"])
        self.step, self.seconds = state["step"], state["seconds"]
        if state["world"] != self.team.world:
            return
        own = state["processes"][self.team.rank]
        self.window.restore(own["losses"])
        torch.set_rng_state(own["cpu"])
        if self.device.type == "cuda" and "cuda" in own:
            torch.cuda.set_rng_state(own["cuda"], self.device)
