"""Reads in threads, lets DALI decode, crop and flip, and `augment_` (or DALI) change the colours."""

from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from fastssl.data import dali_graph, damaged, geometry
from fastssl.data.augmentation import View
from fastssl.data.damaged import Item
from fastssl.data.decode import header
from fastssl.data.loading import Loading
from fastssl.data.one_thread import one_thread
from fastssl.data.order import Order, mixed_generator
from fastssl.data.remote_shards import RemoteShards
from fastssl.data.sources import ArrayImages, Images
from fastssl.errors import DataError, FastsslError
from fastssl.ops import augment_, photometric

READERS = 16  # threads that wait for a disk, more than there are cores
ROUNDED_AT_ONCE = 2**18  # values, which a cache holds


class _Batch(NamedTuple):
    number: int
    size: int
    images: Any  # N×H×W×3 uint8, or a list of futures of encoded images and their sizes
    items: Sequence[Item]  # the same by name, if they are encoded


class DaliLoader:
    """The views of a batch follow from (seed, epoch, batch, rank), whatever the number of threads; see `Loader`.

    Args:
        images: in memory or on disk.
        views: the recipe.
        order: which images come when.
        options: see `Loading`.

    Raises:
        FastsslError: a step, or an option, that DALI cannot do.
    """

    def __init__(self, images: Images, views: tuple[View, ...], order: Order, options: Loading) -> None:
        self.images, self.views, self.order, self.options = images, views, order, options
        self.photometric = [view.photometric for view in views]
        self._pixels = (
            images.pixels.permute(0, 2, 3, 1).contiguous().numpy() if isinstance(images, ArrayImages) else None
        )
        self._pipeline: Any = self._build()  # which checks the arguments of all operators
        self._open = False
        self._held: deque[tuple[torch.cuda.Event, Any]] = deque()

    def __len__(self) -> int:
        return len(self.order)

    @property
    def executor(self) -> dict[str, str]:
        """See `Loader`."""
        return {"loader": "dali", "color": self.options.color}

    def batches(self, epoch: int, start: int = 0) -> Generator[list[Tensor], None, None]:
        """See `Loader`.

        Raises:
            DataError: images cannot be read; it names all of them in the batch.
        """
        if self._open:
            raise FastsslError("an iterator of this loader has not come to its end: close() it before the next")
        self._open, in_order = True, False
        self._pipeline = self._pipeline or self._build()
        under_way: deque[_Batch] = deque()
        readers = ThreadPoolExecutor(READERS)
        try:
            with closing(self._read(readers, epoch, start)) as batches:
                for batch in batches:
                    try:
                        self._schedule(batch, epoch)
                    except DataError:
                        while under_way:  # what comes before it is whole
                            yield self._take(under_way.popleft(), epoch)
                        raise
                    under_way.append(batch)
                    if len(under_way) > self.options.prefetch:
                        yield self._take(under_way.popleft(), epoch)
                while under_way:
                    yield self._take(under_way.popleft(), epoch)
            in_order = True
        except GeneratorExit:
            in_order = True  # abandoned between two batches
            raise
        finally:
            readers.shutdown(cancel_futures=True)
            if in_order:
                self._drop(under_way)
            else:
                self._pipeline = None  # who knows what is in it
            self._open = False

    def _build(self) -> Any:
        options, device = self.options, self.options.device
        on_gpu = device.type == "cuda"
        device_id = (torch.cuda.current_device() if device.index is None else device.index) if on_gpu else None
        return dali_graph.build(
            self.views, self.order.batch_size, encoded=self._pixels is None, color=options.color,
            on_gpu=on_gpu, device_id=device_id,
            threads=max(1, options.workers), prefetch=options.prefetch + 1,
        )  # fmt: skip

    def _read(self, readers: ThreadPoolExecutor, epoch: int, start: int) -> Generator[_Batch, None, None]:
        """The batches with their images; the files of the next ones are being read meanwhile."""
        images, order = self.images, self.order
        if isinstance(images, RemoteShards):
            remote = images.batches(
                epoch, start, batch_size=order.batch_size, seed=order.seed, rank=order.rank, world=order.world
            )
            for number, batch in enumerate(remote, start):
                yield self._begin(readers, number, [(name, partial(bytes, encoded)) for name, encoded in batch])
            return
        ahead: deque[_Batch] = deque()
        for number, chosen in order.batches(epoch, start):
            if self._pixels is not None:
                yield _Batch(number, len(chosen), self._pixels[chosen.numpy()], [])
                continue
            assert not isinstance(images, ArrayImages)
            items = [(images.name(i), partial(images.read, i)) for i in chosen.tolist()]
            ahead.append(self._begin(readers, number, items))
            if len(ahead) > self.options.prefetch:
                yield ahead.popleft()
        yield from ahead

    def _begin(self, readers: ThreadPoolExecutor, number: int, items: Sequence[Item]) -> _Batch:
        """A batch whose files are being read, and their headers checked, by the threads."""

        def checked(name: str, read: Callable[[], bytes]) -> tuple[bytes, tuple[int, int]]:
            encoded = read()
            return encoded, header(encoded, name)

        return _Batch(number, len(items), [readers.submit(checked, *item) for item in items], items)

    def _schedule(self, batch: _Batch, epoch: int) -> None:
        """Start a batch; DALI goes on with it in threads of its own."""
        images, sizes = self._encoded(batch) if self._pixels is None else (batch.images, batch.images.shape[1:3])
        feed = self._pipeline.feed_input
        feed("images", images)
        for number in range(len(self.views)):
            for name, values in self._geometry(batch, epoch, number, sizes).items():
                feed(f"{name}{number}", values.numpy())
            if self.photometric[number] and self.options.color == "dali":
                feed(f"color{number}", self._colors(batch, epoch, number).numpy())
        self._pipeline.schedule_run()

    def _take(self, batch: _Batch, epoch: int) -> list[Tensor]:
        """Wait for a batch, and make its views of what DALI gives, on the stream that will use them."""
        gpu = self.options.device.type == "cuda"
        stream = {"cuda_stream": torch.cuda.current_stream(self.options.device).cuda_stream} if gpu else {}
        try:
            outputs = self._pipeline.share_outputs(**stream)
        except RuntimeError as error:
            raise damaged.report(batch.items, error) from None
        views = []
        for number, (view, output) in enumerate(zip(self.views, outputs, strict=True)):
            images = from_dlpack(output.as_tensor())  # N×H×W×3, DALI's memory
            if self.options.color == "dali":
                views.append(images.permute(0, 3, 1, 2).to(self.options.dtype, copy=True))
                continue
            steps, parameters = self.photometric[number], self._colors(batch, epoch, number)
            with one_thread(0 if gpu else batch.size * view.size**2):
                if images.dtype == torch.float32:
                    images = _rounded(images)
                views.append(
                    augment_(images, steps, parameters, mean=view.mean, std=view.std, dtype=self.options.dtype)
                )
        self._pipeline.release_outputs()
        if gpu:
            self._hold(outputs)
        return views

    def _hold(self, outputs: Any) -> None:
        """Keep DALI's memory until the GPU has read it: DALI waits for the host only before it writes there again."""
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.options.device))
        self._held.append((event, outputs))
        while self._held[0][0].query() or len(self._held) > self.options.prefetch:
            self._held[0][0].synchronize()
            self._held.popleft()
            if not self._held:
                return

    def _drop(self, under_way: deque[_Batch]) -> None:
        """Empty the pipeline for the next epoch, when this one ends before its time."""
        while under_way and self._pipeline is not None:
            under_way.popleft()
            try:
                self._pipeline.share_outputs()
                self._pipeline.release_outputs()
            except (RuntimeError, AttributeError):  # the latter when the interpreter is about to end
                self._pipeline = None

    @one_thread()
    def _geometry(self, batch: _Batch, epoch: int, view: int, sizes: Tensor | Sequence[int]) -> dict[str, Tensor]:
        generator = self.generator(batch.number, epoch, view, "geometry")
        return geometry.inputs(self.views[view], geometry.draw(self.views[view], batch.size, generator), sizes)

    @one_thread()
    def _colors(self, batch: _Batch, epoch: int, view: int) -> Tensor:
        size = self.views[view].size
        generator = self.generator(batch.number, epoch, view, "color")
        return photometric.draw_augmentation(self.photometric[view], batch.size, (size, size), generator)

    def generator(self, number: int, epoch: int, view: int, purpose: str) -> torch.Generator:
        """Where the parameters of a batch come from; `purpose` is "geometry" or "color"."""
        return mixed_generator(self.options.seed, epoch, number, self.options.rank, view, purpose)

    def _encoded(self, batch: _Batch) -> tuple[list[Any], Tensor]:
        """The encoded images of a batch and their sizes, N×2, when they have been read.

        Raises:
            DataError: some cannot be read; it names all that are damaged.
        """
        try:
            read = [future.result() for future in batch.images]
        except DataError as error:
            raise damaged.report(batch.items, error) from None
        return [np.frombuffer(encoded, np.uint8) for encoded, _ in read], torch.tensor([size for _, size in read])


def _rounded(images: Tensor) -> Tensor:
    """To 8 bits, halves upwards; `images`, 0…255 in float32, are overwritten."""
    result = torch.empty_like(images, dtype=torch.uint8)
    at_once = len(images) if images.is_cuda else max(1, ROUNDED_AT_ONCE // images.shape[1:].numel())
    for some, to in zip(images.split(at_once), result.split(at_once), strict=True):
        to.copy_(some.add_(0.5 + dali_graph.ROUND_UP))  # which cuts off
    return result
