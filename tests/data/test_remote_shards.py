"""Shards on s3://: the order, resuming, and what a store can do wrong; DALI's own client reads from a small store."""

import importlib.util
import os
import subprocess
import sys
import tarfile
import textwrap
import threading
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from fastssl.data import remote_shards, s3, wds_index
from fastssl.data.remote_shards import RemoteShards, expand
from fastssl.errors import DataError, FastsslError
from tests.data.object_store import Store, running, tar, wds2idx

Names = list[tuple[str, bytes]]
SHARDS, EACH = 6, 20
PATHS = expand("s3://bucket/set/train-{00..05}.tar")
needs_dali = pytest.mark.skipif(importlib.util.find_spec("nvidia.dali") is None, reason="DALI is not installed")
ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "key",
    "AWS_SECRET_ACCESS_KEY": "secret",
    "AWS_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_MAX_ATTEMPTS": "1",  # faults here last, and each attempt of a hanging request takes 3 s
}


@pytest.fixture(scope="module")
def the_store() -> Iterator[Store]:
    """DALI's client reads the environment once a process, so there is one store for all tests."""
    with running() as store, pytest.MonkeyPatch.context() as patch:
        for name, value in {**ENVIRONMENT, "AWS_ENDPOINT_URL": store.url}.items():
            patch.setenv(name, value)
        yield store


@pytest.fixture(scope="module")
def members(the_store: Store) -> dict[str, bytes]:
    """Six shards with their indexes in the store; image bytes by name."""
    draw = np.random.default_rng(0)
    images: dict[str, bytes] = {}
    for path in PATHS:
        content: dict[str, bytes] = {}
        for number in range(EACH):
            key = f"{path[-6:-4]}/{number:03d}" + ("-long" * 25 if number == 7 else "") + ("é" if number == 8 else "")
            content[f"{key}.json"] = b"{}"
            content[f"{key}.JPG"] = images[f"{path}/{key}.JPG"] = draw.bytes(int(draw.integers(200, 2000)))
            content[f"{key}.cls"] = b"1"
        data = tar(content, tarfile.PAX_FORMAT if path == PATHS[0] else tarfile.GNU_FORMAT)
        the_store.put(path[5:], data)
        the_store.put(path[5:-4] + ".idx", wds2idx(data))
    return images


@pytest.fixture
def store(the_store: Store, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """Small pieces, so that there are many; faults end with the test."""
    monkeypatch.setattr(remote_shards, "PIECE", 8192)
    monkeypatch.setattr(remote_shards, "GROUP", 8)
    monkeypatch.setattr(s3, "PAUSE", 0.01)
    the_store.requests()
    yield the_store
    the_store.requests()


def drain(batches: Iterator[list[tuple[str, Any]]]) -> list[Names]:
    return [[(name, data.tobytes()) for name, data in batch] for batch in batches]


def flat(batches: list[Names]) -> Names:
    return [image for batch in batches for image in batch]


@needs_dali
def test_every_image_comes_once_an_epoch_and_in_another_order_in_the_next(
    store: Store, members: dict[str, bytes]
) -> None:
    shards = RemoteShards(PATHS)
    assert len(shards) == SHARDS * EACH
    assert shards.labels is None
    orders = []
    for epoch in range(2):
        batches = drain(shards.batches(epoch, batch_size=4, seed=1))
        assert [len(batch) for batch in batches] == [4] * 30
        assert dict(flat(batches)) == members
        orders.append([name for name, _ in flat(batches)])
    same = sum(a == b for a, b in zip(*orders, strict=True))
    assert same < 10
    assert orders[0] == [name for name, _ in flat(drain(shards.batches(0, batch_size=4, seed=1)))]
    assert orders[0] != [name for name, _ in flat(drain(shards.batches(0, batch_size=4, seed=2)))]
    # Images of several shards are mixed with each other, neighbours in a shard are not neighbours here.
    assert np.mean([len({name[:32] for name in orders[0][i : i + 8]}) for i in range(0, 120, 8)]) > 3


@needs_dali
def test_a_run_goes_on_at_any_batch_and_fetches_one_group_for_it(store: Store, members: dict[str, bytes]) -> None:
    shards = RemoteShards(PATHS)
    whole = drain(shards.batches(3, batch_size=7, seed=0))
    assert len(whole) == 17
    for start in (1, 2, 4, 7, 10, 13, 16, 17):
        assert drain(shards.batches(3, start, batch_size=7, seed=0)) == whole[start:]
    assert drain(RemoteShards(PATHS).batches(3, 9, batch_size=7, seed=0)) == whole[9:]
    store.requests()
    RemoteShards(PATHS)
    assert Counter(method for method, _, _ in store.requests()) == {"HEAD": SHARDS, "GET": SHARDS}  # the indexes
    batches = shards.batches(3, 16, batch_size=7, seed=0)
    next(batches)
    batches.close()  # type: ignore[attr-defined]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("fastssl-s3")]
    requests = Counter(method for method, _, _ in store.requests())
    assert requests["HEAD"] == requests["GET"] <= 2 * remote_shards.GROUP


@needs_dali
@pytest.mark.parametrize("world", [2, 3, 7])
def test_ranks_share_an_epoch(store: Store, members: dict[str, bytes], world: int) -> None:
    shards = RemoteShards(PATHS)
    ranks = [drain(shards.batches(0, batch_size=5, seed=0, rank=rank, world=world)) for rank in range(world)]
    number = len(members) // (5 * world)
    assert [len(batches) for batches in ranks] == [number] * world
    together = flat(flat(ranks))  # type: ignore[arg-type]
    assert len(together) == len(dict(together)) == number * 5 * world
    assert dict(together).items() <= members.items()
    resumed = drain(shards.batches(0, 2, batch_size=5, seed=0, rank=world - 1, world=world))
    assert resumed == ranks[-1][2:]


@needs_dali
def test_without_an_index_the_shard_tells_and_a_warning_says_what_that_costs(
    store: Store, members: dict[str, bytes]
) -> None:
    with_index = RemoteShards(PATHS)
    store.fault("bucket/set/train-03.idx", "404", "HEAD")
    with pytest.warns(UserWarning, match=r"1 of 6 .*train-03\.idx.*wds2idx"):
        shards = RemoteShards(PATHS)
    assert shards.digest == with_index.digest
    assert drain(shards.batches(0, batch_size=8, seed=0)) == drain(with_index.batches(0, batch_size=8, seed=0))


@needs_dali
def test_names_are_left_out(store: Store, members: dict[str, bytes]) -> None:
    images = sorted(members)[3:6]
    shards = RemoteShards(PATHS, frozenset([*images, PATHS[4]]))
    kept = {n: d for n, d in members.items() if n not in images and not n.startswith(PATHS[4])}
    assert dict(flat(drain(shards.batches(0, batch_size=1, seed=0)))) == kept
    assert shards.digest != RemoteShards(PATHS).digest
    some, others = (shards.subset(torch.tensor([first, 5])) for first in (0, 1))
    assert some.digest == shards.subset(torch.tensor([0, 5])).digest != others.digest


@needs_dali
def test_images_larger_than_a_piece_and_shards_without_images(store: Store) -> None:
    images = {f"{i}.png": bytes([i]) * 20000 for i in range(3)}
    for name, content in (("big", images), ("none", {"a.txt": b"text"})):
        store.put(f"bucket/odd/{name}.tar", data := tar(content))
        store.put(f"bucket/odd/{name}.idx", wds2idx(data))
    shards = RemoteShards(expand("s3://bucket/odd/{big,none}.tar"))
    found = flat(drain(shards.batches(0, batch_size=3, seed=0)))
    assert dict(found) == {f"s3://bucket/odd/big.tar/{n}": d for n, d in images.items()}
    with pytest.raises(FastsslError, match="no images in 1 shards"):
        RemoteShards(["s3://bucket/odd/none.tar"])


@needs_dali
def test_an_argument_out_of_its_range(store: Store, members: dict[str, bytes]) -> None:
    shards = RemoteShards(PATHS)
    with pytest.raises(FastsslError, match="more than the 120 images"):
        shards.batches(0, batch_size=61, seed=0, world=2)
    with pytest.raises(FastsslError, match="start must be from 0 to the 30"):
        shards.batches(0, 31, batch_size=4, seed=0)
    with pytest.raises(FastsslError, match="rank below world, got 4, 2, 2"):
        shards.batches(0, batch_size=4, seed=0, rank=2, world=2)


@needs_dali
def test_a_missing_shard_or_bucket_is_named(store: Store) -> None:
    with pytest.warns(UserWarning), pytest.raises(DataError, match=r"'s3://bucket/set/no\.tar' \(it is not there"):
        RemoteShards(["s3://bucket/set/no.tar"])
    store.fault("secret", "403", "LIST")
    store.fault("secret/", "403", "LIST")
    with pytest.warns(UserWarning), pytest.raises(DataError, match=r"'s3://secret/a\.tar' \(AccessDenied: not today\)"):
        RemoteShards(["s3://secret/a.tar"])


@needs_dali
@pytest.mark.parametrize(
    ("kind", "method", "reason"),
    [
        ("404", "HEAD", "not there"),
        ("403", "GET", "AccessDenied: not today|cannot read its answer"),  # DALI can now and then
        ("500", "GET", "InternalError: not today|cannot read its answer"),
        ("cut", "GET", "broke off|curlCode: 18"),
    ],
)
def test_faults_of_the_store_name_the_shard(
    store: Store, members: dict[str, bytes], kind: str, method: str, reason: str
) -> None:
    shards = RemoteShards(PATHS)
    store.fault("bucket/set/train-02.tar", kind, method)
    with pytest.raises(DataError, match=rf"'s3://bucket/set/train-02\.tar' \(.*({reason}).*AWS_ACCESS_KEY_ID"):
        drain(shards.batches(0, batch_size=4, seed=0))
    asked = [path for m, path, _ in store.requests() if m == method and path == "/bucket/set/train-02.tar"]
    assert len(asked) <= 3 * s3.THREADS * s3.ATTEMPTS


@needs_dali
@pytest.mark.parametrize("kind", ["hang", pytest.param("stall", marks=pytest.mark.slow)])
def test_a_store_that_hangs_ends_in_an_error(
    store: Store, members: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(s3, "ATTEMPTS", 1)
    shards = RemoteShards(PATHS)
    store.fault("bucket/set/train-02.tar", kind)
    with pytest.raises(DataError, match=r"'s3://bucket/set/train-02\.tar' \(.*curlCode: 28"):
        drain(shards.batches(0, batch_size=4, seed=0))


@needs_dali
@pytest.mark.parametrize(("kind", "method"), [("cut", "GET"), ("500", "GET"), ("500", "HEAD")])
def test_a_store_that_fails_for_a_moment_is_forgiven(
    store: Store, members: dict[str, bytes], kind: str, method: str
) -> None:
    shards = RemoteShards(PATHS)
    store.fault("bucket/set/train-02.tar", kind, method, times=2)
    assert dict(flat(drain(shards.batches(0, batch_size=4, seed=0)))) == members


@needs_dali
def test_damaged_shards_and_indexes(store: Store) -> None:
    data = tar({f"{i}.jpg": bytes([i]) * 600 for i in range(8)})
    shard = "s3://bucket/bad/a.tar"

    def opened(idx: bytes | None, tarred: bytes = data) -> RemoteShards:
        store.put("bucket/bad/a.tar", tarred)
        store.remove("bucket/bad/a.idx")
        if idx is not None:
            store.put("bucket/bad/a.idx", idx)
        return RemoteShards([shard])

    with pytest.raises(DataError, match=r"'s3://bucket/bad/a\.idx' \(it begins with 'v1\.1 8'"):
        opened(wds2idx(data).replace(b"v1.2", b"v1.1"))
    cut = data[:4000]
    with pytest.warns(UserWarning), pytest.raises(DataError, match=r"'s3://bucket/bad/a\.tar' \(it is cut short"):
        opened(None, cut)
    shards = opened(wds2idx(data), cut)
    with pytest.raises(DataError, match=r"'s3://bucket/bad/a\.tar' \(it ends before byte"):
        drain(shards.batches(0, batch_size=8, seed=0))
    renamed = tar({f"{7 - i}.jpg": bytes([i]) * 600 for i in range(8)})
    shards = opened(wds2idx(data), renamed)
    with pytest.raises(DataError, match=r"'s3://bucket/bad/a\.tar/\d\.jpg' is not where the index"):
        drain(shards.batches(0, batch_size=8, seed=0))


def test_an_index() -> None:
    text = "v1.2 2\njson 512 2 a/1.json jpg 1536 7 a/1.jpg mask.png 3072 9 a/1.mask.png\ncls 4096 1 2.cls\n"
    assert wds_index.parse(text) == [("a/1.jpg", 1536, 7)]
    for wrong, reason in (
        ("", "begins with ''"),
        ("v1.2 2\njpg 512 1 a.jpg\n", "1 of the 2 samples"),
        ("v1.2 1\njpg 512 1 a b.jpg\n", "line 2 .*spaces"),
        ("v1.2 1\njpg 600 1 a.jpg\n", "line 2 'a.jpg' is at byte 600"),
        ("v1.2 1\njpg 512 1 a.jpg png 1536 1 a.png\n", r"sample 'a' has 2 images \(a\.jpg, a\.png\)"),
    ):
        with pytest.raises(ValueError, match=reason):
            wds_index.parse(wrong)


def test_braces() -> None:
    assert expand("s3://b/x/a-{08..11}.tar") == [f"s3://b/x/a-{n}.tar" for n in ("08", "09", "10", "11")]
    assert expand("s3://b/{x,y}/{0..1}.tar") == [f"s3://b/{f}/{n}.tar" for f in "xy" for n in "01"]
    assert expand("s3://b/1.tar::s3://c/2.tar") == ["s3://b/1.tar", "s3://c/2.tar"]
    for wrong, reason in (
        ("s3://b/*.tar", "wildcard.*{000..255}"),
        ("s3://b/a#1.tar", "has a #"),
        ("s3://b/x", "named s3://BUCKET"),
        ("s3://{a,b}/x.tar", "named s3://BUCKET"),
        ("s3://b/{9..0}.tar", "backwards"),
        ("s3://b/{0..}.tar", "neither"),
        ("s3://b/{0..1.tar", "neither"),
        ("s3://b/{0..99999999}.tar", "more than 1,000,000"),
        ("s3://b/{0..9999}{0..9999}.tar", "more than 1,000,000"),
        ("s3://b/{a,a}.tar", "'s3://b/a.tar' more than once"),
    ):
        with pytest.raises(FastsslError, match=reason):
            expand(wrong)


def run(program: str, url: str) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, **ENVIRONMENT, "AWS_ENDPOINT_URL": url}
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        env=environment, capture_output=True, text=True, timeout=40, check=False,
    )  # fmt: skip


@pytest.mark.slow  # DALI's client waits for 12 s
@needs_dali
def test_no_store_at_all() -> None:
    program = """
        from fastssl.data import remote_shards, s3
        s3.ATTEMPTS = 1
        remote_shards.RemoteShards(["s3://bucket/a.tar"])
    """
    ended = run(program, "http://127.0.0.1:9")
    assert ended.returncode == 1
    assert "fastssl.errors.DataError: cannot read 's3://bucket/a.idx' (" in ended.stderr
    assert "127.0.0.1" in ended.stderr.splitlines()[-1]


@pytest.mark.slow  # DALI's client waits for 12 s
@needs_dali
def test_a_process_ends_though_requests_are_under_way(
    store: Store, members: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    program = """
        from fastssl.data import remote_shards, s3
        remote_shards.PIECE, remote_shards.GROUP, s3.ATTEMPTS = 8192, 2, 1
        shards = remote_shards.RemoteShards(remote_shards.expand("s3://bucket/set/train-{00..05}.tar"))
        batches = shards.batches(0, batch_size=2, seed=0)
        print(len(next(batches)))
    """
    monkeypatch.setattr(remote_shards, "GROUP", 2)
    first = {name[:28] for name, _ in next(RemoteShards(PATHS).batches(0, batch_size=8, seed=0))}
    for path in set(PATHS) - first:
        store.fault(path[5:], "hang")
    began = time.monotonic()
    ended = run(program, store.url)
    assert (ended.stdout, ended.stderr, ended.returncode) == ("2\n", "", 0)
    assert time.monotonic() - began < 20
    asked = {"s3:/" + path for method, path, _ in store.requests() if method == "GET"}
    assert asked - first, "nothing hung"


def test_a_pause_before_another_attempt_ends_with_the_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "PAUSE", 60.0)
    asked = threading.Event()

    def breaks_off(argument: object) -> None:
        asked.set()
        raise s3.BrokeOff("again")

    threads = s3.Threads()
    (future,) = threads.map(breaks_off, [None])
    assert asked.wait(10)
    began = time.monotonic()
    threads.close()
    assert time.monotonic() - began < 10
    with pytest.raises(DataError, match="has been closed"):
        future.result()


def test_without_dali(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(FastsslError, match=r"pip install fastssl\[dali\]"):
        RemoteShards(["s3://bucket/a.tar"])
