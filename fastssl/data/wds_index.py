"""The index beside a WebDataset shard, in DALI's format: `pack` writes it, and `s3://` is read by it."""

import re
from collections.abc import Sequence

from fastssl.data.decode import EXTENSIONS
from fastssl.data.tar_index import BLOCK, Image, only_image


def path_of(shard: str) -> str:
    """Where the index of a shard lies."""
    return shard.removesuffix(".tar") + ".idx"


def entry(member: str, offset: int, length: int) -> str:
    """What an index says about one member of a shard."""
    return f"{member.split('.', 1)[1]} {offset} {length} {member}"


def text(samples: Sequence[Sequence[str]]) -> str:
    """An index, of the entries of each sample."""
    return "".join(f"{line}\n" for line in (f"v1.2 {len(samples)}", *map(" ".join, samples)))


def parse(content: str) -> list[Image]:
    """The images in an index of DALI's wds2idx: `v1.2 SAMPLES`, then a line a sample of `EXTENSION OFFSET SIZE MEMBER`.

    Raises:
        ValueError: it is none.
    """
    head, *lines = content.removesuffix("\n").split("\n")
    if not re.fullmatch(r"v1\.2 \d+", head):
        raise ValueError(f"it begins with '{head[:40]}' instead of 'v1.2' and the number of samples")
    if int(head[5:]) != len(lines):
        raise ValueError(f"it has {len(lines)} of the {head[5:]} samples that it speaks of")
    samples: dict[str, list[tuple[str, Image]]] = {}
    for number, line in enumerate(lines, 2):
        words = line.split(" ")
        if len(words) % 4 or not all(w.isdigit() for i in (1, 2) for w in words[i::4]):
            raise ValueError(f"line {number} is not EXTENSION OFFSET SIZE MEMBER; names with spaces cannot be indexed")
        for extension, offset, length, member in zip(*(words[i::4] for i in range(4)), strict=True):
            if f".{extension}".lower().endswith(EXTENSIONS):
                key = member[: len(member) - len(extension) - 1]
                if int(offset) < BLOCK or int(offset) % BLOCK:
                    raise ValueError(
                        f"in line {number} '{member}' is at byte {offset}, where no member of a tar begins"
                    )
                image = (member, int(offset), int(length))
                samples.setdefault(key, []).append((f".{extension}".lower(), image))
    return [only_image(key, images) for key, images in samples.items()]
