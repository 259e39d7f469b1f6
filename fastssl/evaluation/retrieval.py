"""Instance retrieval: does an augmented view of an image find the image it was made from?"""

from torch import Tensor

from fastssl.errors import FastsslError


def retrieval_accuracy(augmented: Tensor, originals: Tensor, *, chunk: int = 1024) -> float:
    """Top-1, 0…1: how often row i of `augmented` is nearest, by cosine, to row i of `originals`.

    It is what instance discrimination trains for, measured on images held out.

    Args:
        augmented: N×F, rows of length 1: features of one augmented view of each image.
        originals: N×F, rows of length 1: features of the images as they are.
        chunk: rows compared at a time; memory is chunk×N.

    Raises:
        FastsslError: the shapes differ.
    """
    if augmented.shape != originals.shape or not len(originals):
        raise FastsslError(f"retrieval needs a view of each image, got {len(augmented)} for {len(originals)}")
    found = 0
    for start in range(0, len(originals), chunk):
        nearest = (augmented[start : start + chunk] @ originals.T).argmax(1)
        found += int((nearest == nearest.new_tensor(range(start, start + len(nearest)))).sum())
    return found / len(originals)
