"""The training loop."""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastssl.data import augmentation as aug
from fastssl.data.identity import identity
from fastssl.data.loader import Loader, make_loader
from fastssl.data.loading import Loading
from fastssl.data.order import mixed_seed
from fastssl.engine.build import build_method, build_source, load_weights
from fastssl.engine.checkpoint import changes, check_data, check_fits, load
from fastssl.engine.config import Config, check, to_dict, to_yaml
from fastssl.engine.device import autocast_dtype, keep_freed_memory, select_device
from fastssl.engine.interrupt import Interrupt
from fastssl.engine.logger import RunLogger
from fastssl.engine.optimizers import make_optimizer
from fastssl.engine.run_folder import RunFolder, open_run_folder, read_metrics
from fastssl.engine.schedules import learning_rate
from fastssl.errors import DataError, FastsslError
from fastssl.evaluation.evaluator import Evaluator
from fastssl.evaluation.report import Result, neighbours, table, write_report


class Trainer:
    """One training from its configuration to its report.

    Args:
        config: what to train, on what, where to write.
        name: of the run, for the default run folder.

    Raises:
        FastsslError: something in the configuration, the data or the output folder is wrong; nothing has been trained.
    """

    def __init__(self, config: Config, name: str) -> None:
        check(config)
        self.config = config
        self.device = select_device(config.gpus)
        self.dtype = autocast_dtype(config.precision, self.device)
        if self.device.type == "cpu":
            keep_freed_memory()
        torch.backends.cudnn.benchmark = True
        augmentation = aug.load(config.augmentation)
        loading = Loading(
            config.loader, config.color, self.device, self.dtype or torch.float32,
            workers=min(8, torch.get_num_threads()) if config.workers is None else config.workers,
            prefetch=config.prefetch, seed=config.seed, last_batch=config.last_batch,
        )  # fmt: skip
        source = build_source(config, augmentation)
        self.loader: Loader = make_loader(source.train, augmentation, config.batch_size, loading)
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
        self.method = self._place(build_method(config, self.total_steps))
        self.optimizer = make_optimizer(self.method, config)
        self.rate: Callable[[int], float] = learning_rate(config, len(self.loader), self.total_steps)
        self.last = (math.nan, 0.0)  # loss and images/s as logged last
        torch.manual_seed(mixed_seed(config.seed, "training"))
        self.run: RunFolder = open_run_folder(config, name)
        self.notes: list[tuple[str, bool]] = []  # to be said at the start; True: a warning
        self._resume()
        self.run.prepare(config, self.step)

    def fit(self) -> int:
        """Train to the end and write the report; returns 0, or 128 + the signal that asked to stop."""
        with Interrupt() as interrupt, RunLogger(self.run, self.total_steps, self.step) as log:
            self._announce(log)
            if self.config.compile:
                for network in self.method.children():
                    network.compile()
            if self.step == 0:
                self._evaluate(log)
            while self.step < self.total_steps and not interrupt.requested:
                try:
                    self._epoch(interrupt, log)
                except DataError:
                    self._save(log, last=False)
                    raise
                except RuntimeError as error:
                    if interrupt.requested is None or "DataLoader worker" not in str(error):
                        raise
                    # A scheduler may send SIGTERM to every process; perhaps it came in mid-step, so nothing is saved.
                    log.say(f"{interrupt.requested.name}: ended with its workers; {self._last_checkpoint()}")
                    return 128 + interrupt.requested.value
            if interrupt.requested:
                path = self.run.checkpoints.save(self._state())
                log.say(
                    f"{interrupt.requested.name}: saved {path} at step {self.step}; go on with "
                    f"--resume auto --output {self.run.path}"
                )
                return 128 + interrupt.requested.value
            self._finish(log)
        return 0

    def _epoch(self, interrupt: Interrupt, log: RunLogger) -> None:
        """From the present step to the end of its epoch, of the training, or until interrupted."""
        config, steps = self.config, len(self.loader)
        knn_steps = max(1, round(config.knn_epochs * steps)) if config.knn_epochs else self.total_steps
        save_steps = config.checkpoint_steps or steps
        self.method.train()
        losses: list[Tensor] = []
        mark = time.perf_counter()
        for views in self.loader.batches(*divmod(self.step, steps)):
            losses.append(self._train_step(views))
            self.step += 1
            last = self.step == self.total_steps
            evaluate = self.step % knn_steps == 0 or last
            save = self.step % save_steps == 0 or last
            if self.step % config.log_steps == 0 or evaluate or save or interrupt.requested:
                loss = torch.stack(losses).mean().item()  # waits for the device, so the time is true
                elapsed = time.perf_counter() - mark
                self.seconds += elapsed
                self._log(log, loss, len(losses) * config.batch_size / elapsed)
                if evaluate:
                    self._evaluate(log)
                if save:
                    self._save(log, last)
                losses, mark = [], time.perf_counter()
            if last or interrupt.requested:
                return

    def _train_step(self, views: list[Tensor]) -> Tensor:
        order = torch.channels_last if self.config.channels_last else torch.contiguous_format
        views = [view.to(self.device, non_blocking=True, memory_format=order) for view in views]
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate(self.step)
        with torch.autocast(self.device.type, self.dtype or torch.bfloat16, enabled=self.dtype is not None):
            loss = self.method(views)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.method.after_step()
        return loss.detach()

    def _log(self, log: RunLogger, loss: float, speed: float) -> None:
        if not math.isfinite(loss):
            raise FastsslError(
                f"the loss is {loss} at step {self.step}: lower --lr (now {self.rate(self.step - 1):g}) or lengthen "
                f"--warmup_epochs; {self._last_checkpoint()}"
            )
        epoch = self.step / len(self.loader)
        log.metrics(
            self.step, epoch=epoch, loss=loss, lr=self.rate(self.step - 1),
            momentum=float(self.method.momentum), images_per_second=speed, seconds=self.seconds,
        )  # fmt: skip
        log.progress(self.step, epoch=f"{epoch:.1f}", loss=f"{loss:.3f}", speed=f"{speed:,.0f}")
        self.last = (loss, speed)

    def _evaluate(self, log: RunLogger) -> None:
        epoch = f"epoch {self.step / len(self.loader):5.1f}"
        if self.step:
            epoch += "  loss {:.3f}  {:,.0f} images/s".format(*self.last)
        if not self.config.knn_epochs or self.evaluator.cannot_knn:
            if self.step:
                log.say(epoch)
            return
        knn = self.evaluator.knn(self.method.backbone)
        assert knn is not None
        log.metrics(self.step, epoch=self.step / len(self.loader), knn=knn, seconds=self.seconds)
        log.progress(self.step, knn=f"{knn:.1%}")
        log.say(f"{epoch}  kNN {knn:.1%}")

    def _save(self, log: RunLogger, last: bool) -> None:
        try:
            self.run.checkpoints.save(self._state())
        except FastsslError as error:
            if last:
                raise
            log.say(f"{error}; training goes on", warning=True)  # a full disk may be emptied before the next one

    def _finish(self, log: RunLogger) -> None:
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

    def _announce(self, log: RunLogger) -> None:
        for note, warning in self.notes:
            log.say(note, warning)
        source = self.evaluator.source
        images = f"{len(source.train):,} images"
        if source.test is not None:
            images += f", {len(source.test):,} held out"
        log.say(
            f"{self.config.method} with {self.config.backbone} on {source.name}: {images}, "
            f"{self.total_steps} steps of {self.config.batch_size} on {self.device} in {self.dtype or torch.float32}, "
            f"views by {self.loader.executor['loader']}"
        )
        log.say(f"run folder: {self.run.path}")
        if self.config.knn_epochs and self.evaluator.cannot_knn:
            log.say(f"no kNN accuracy: {self.evaluator.cannot_knn}")

    def _place(self, method: Any) -> Any:
        if self.config.channels_last:
            method = method.to(memory_format=torch.channels_last)
        return method.to(self.device)

    def _state(self) -> dict[str, Any]:
        rng = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.device)
        return {
            "method": self.config.method, "config": to_dict(self.config), "model": self.method.state_dict(),
            "optimizer": self.optimizer.state_dict(), "step": self.step, "total_steps": self.total_steps,
            "seconds": self.seconds, "data": self.data, "rng": rng,
        }  # fmt: skip

    def _resume(self) -> None:
        """Go on from the checkpoint that the configuration asks for, if there is one."""
        if self.config.resume == "never":
            return
        if self.config.resume == "auto":
            found = self.run.checkpoints.newest()
            if found is None:
                return
            path, state, complaints = found
            self.notes += [(complaint, True) for complaint in complaints]
        else:
            path = Path(self.config.resume)
            state = load(path)
        check_fits(path, state, self.config)
        check_data(path, state["data"], self.data)
        self._restore(state)
        self.notes.append((f"resumed from {path} at step {self.step}", False))
        for name, (there, here) in changes(state, self.config).items():
            self.notes.append((f"{name} was {there} and is {here} from here on", True))

    def _restore(self, state: dict[str, Any]) -> None:
        load_weights(self.method, state)
        options = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, own in zip(self.optimizer.param_groups, options, strict=True):
            group.update(own)  # weight decay and the like are the configuration's, not the checkpoint's
        self.step, self.seconds = state["step"], state["seconds"]
        torch.set_rng_state(state["rng"]["cpu"])
        if self.device.type == "cuda" and "cuda" in state["rng"]:
            torch.cuda.set_rng_state(state["rng"]["cuda"], self.device)

    def _last_checkpoint(self) -> str:
        paths = self.run.checkpoints.paths()
        return f"the last checkpoint is {paths[-1]}" if paths else "there is no checkpoint yet"
