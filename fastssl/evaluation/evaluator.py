"""The two measures of a backbone on a source's held-out images, during training and after."""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from fastssl.data.augmentation import Augmentation, View
from fastssl.data.loader import view_batches
from fastssl.data.loading import Loading
from fastssl.data.sources import Images, Source
from fastssl.evaluation.features import extract, raw_pixels
from fastssl.evaluation.knn import knn_accuracy
from fastssl.evaluation.retrieval import retrieval_accuracy

RETRIEVAL_IMAGES = 2000


@dataclass(frozen=True)
class Measures:
    """Top-1 accuracies, 0…1; None where the source has no labels or no held-out images."""

    knn: float | None
    retrieval: float | None


@dataclass(frozen=True)
class Evaluator:
    """Measures backbones on one source.

    Args:
        source: the images; its training part is the kNN's bank, its test part the queries.
        augmentation: its first view gives size and normalisation, and the augmented views of the retrieval.
        device: to compute on.
        dtype: to autocast to, or None.
        k, temperature: of the kNN's votes.
        bank_images: most training images in the bank.
        loading: how the views are made; its seed chooses the bank too.
    """

    source: Source
    augmentation: Augmentation
    device: torch.device
    dtype: torch.dtype | None = None
    k: int = 200
    temperature: float = 0.1
    bank_images: int = 50_000
    loading: Loading = field(default_factory=Loading)

    @property
    def cannot_knn(self) -> str | None:
        """Why there is no kNN accuracy for this source, or None."""
        if self.source.test is None:
            return "no held-out images: give a folder with train/ and val/, or --holdout 0.1"
        if self.source.train.subset(torch.tensor([0])).labels is None or self.source.test.labels is None:
            return "the images have no labels: sort them into a folder a class to see it"
        return None

    def measure(self, backbone: nn.Module | None) -> Measures:
        """Both measures of `backbone`; of the raw pixels where it is None."""
        return Measures(self.knn(backbone), self.retrieval(backbone))

    def knn(self, backbone: nn.Module | None) -> float | None:
        """Weighted kNN accuracy on the held-out images."""
        train, test = self.source.train, self.source.test
        if len(train) > self.bank_images:  # before anybody asks for labels: TFRecords keep them beside the images
            chosen = torch.randperm(len(train), generator=torch.Generator().manual_seed(self.loading.seed))
            train = train.subset(chosen[: self.bank_images].sort().values)
        if train.labels is None or test is None or test.labels is None:
            return None
        view = self.augmentation.views[0].evaluation
        bank, queries = self.features(backbone, train, view), self.features(backbone, test, view)
        assert train.labels is not None
        return knn_accuracy(bank, train.labels, queries, test.labels, k=self.k, temperature=self.temperature)

    def retrieval(self, backbone: nn.Module | None) -> float | None:
        """How often an augmented view of a held-out image (at most 2,000 of them) finds its source."""
        if self.source.test is None:
            return None
        images, view = self.gallery(), self.augmentation.views[0]
        return retrieval_accuracy(
            self.features(backbone, images, view), self.features(backbone, images, view.evaluation)
        )

    def gallery(self) -> Images:
        """The images of the retrieval: held out, or of the training set where none are; evenly spaced."""
        images = self.source.train if self.source.test is None else self.source.test
        count = min(RETRIEVAL_IMAGES, len(images))
        return images.subset(torch.arange(count) * len(images) // count)

    def features(self, backbone: nn.Module | None, images: Images, view: View) -> Tensor:
        """Normalised features of one view of every image."""
        loading = replace(self.loading, device=self.device, dtype=torch.float32)
        batches = view_batches(images, view, 500, loading)
        if backbone is None:
            return raw_pixels(batches)
        autocast = None if self.dtype is None else torch.autocast(self.device.type, self.dtype)
        return extract(backbone, batches, autocast)
