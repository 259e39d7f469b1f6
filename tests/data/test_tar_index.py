"""The index of a tar against the standard library's tarfile, and what is refused."""

import gzip
import io
import tarfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastssl.data.tar_index import index
from tests.data.pictures import write_tar

FORMATS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)

parts = st.text("abcdefgh ü漢_-", min_size=1, max_size=60)
members = st.lists(
    st.tuples(
        st.lists(parts, min_size=1, max_size=5).map("/".join), st.sampled_from([".jpg", ".json", ".cls", "/x.PNG"])
    ),
    min_size=1,
    max_size=12,
    unique_by=lambda member: member[0],
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(names=members, format=st.sampled_from(FORMATS), data=st.data())
def test_offsets_are_tarfiles(names: list[tuple[str, str]], format: int, data: st.DataObject, tmp_path: Path) -> None:
    """Short and long names of every format, any sizes, other members between."""
    if format == tarfile.USTAR_FORMAT:
        ascii_names = [(name.encode("ascii", "ignore").decode()[:60], end) for name, end in names]
        names = [("/".join(part or "x" for part in name.split("/")), end) for name, end in ascii_names]
        names = list({name: (name, end) for name, end in names}.values())
    contents = [(n + e, b"3" if e == ".cls" else bytes(data.draw(st.integers(0, 1600)))) for n, e in names]
    path = write_tar(tmp_path / "x.tar", contents, format)
    found = index(str(path))
    with tarfile.open(path) as tar:
        expected = {m.name: (m.offset_data, m.size) for m in tar if m.name.lower().endswith((".jpg", ".png"))}
    assert dict(zip(found.members, zip(found.offsets, found.lengths, strict=True), strict=True)) == expected


def test_samples_are_grouped_by_the_path_up_to_the_first_dot(tmp_path: Path) -> None:
    files = [
        ("a/0.jpg", b"A"), ("a/0.json", b"{}"), ("a/0.cls", b"5\n"), ("b/0.cls", b"6"), ("b/0.mask.png", b"M"),
        ("b/0.jpg", b"B"), ("c/n.0.JPEG", b"C"), ("note", b""), (".hidden.jpg", b""),
    ]  # fmt: skip
    found = index(str(write_tar(tmp_path / "x.tar", files)))
    assert found.members == ["a/0.jpg", "b/0.jpg", "c/n.0.JPEG"]
    assert found.labels == [5, 6, None]


@pytest.mark.parametrize("format", FORMATS)
def test_a_cut_is_told_wherever_it_is(format: int, tmp_path: Path) -> None:
    names = [
        (f"{'long' * 30}/{i}.{e}" if format != tarfile.USTAR_FORMAT else f"{i}.{e}")
        for i in range(6)
        for e in ("jpg", "cls")
    ]
    path = write_tar(tmp_path / "x.tar", [(n, b"1" * (700 if n.endswith("jpg") else 1)) for n in names], format)
    whole = path.read_bytes()
    end = len(whole.rstrip(b"\0"))
    end += -end % 512
    for cut in [*range(0, end + 512, (end + 511) // 20), end, end + 511]:
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match="cut short"):
            index(str(path))
    path.write_bytes(whole[: end + 512])  # all is there
    assert len(index(str(path)).members) == 6


def _tar(*members: tarfile.TarInfo) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for member in members:
            tar.addfile(member, io.BytesIO(bytes(member.size)))
    return buffer.getvalue()


def _link() -> tarfile.TarInfo:
    info = tarfile.TarInfo("b.jpg")
    info.type, info.linkname = tarfile.LNKTYPE, "a.jpg"
    return info


def _damaged() -> bytes:
    whole = bytearray(_tar(tarfile.TarInfo("a.jpg"), tarfile.TarInfo("b.jpg")))
    whole[600] ^= 1
    return bytes(whole)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"x" * 2000, "not a tar"),
        (gzip.compress(b"x" * 100_000, 0), "is compressed"),
        (_tar(tarfile.TarInfo("a.jpg")) + _tar(tarfile.TarInfo("b.jpg")), "tar -A"),
        (_tar(tarfile.TarInfo("a.jpg"), _link()), "'b.jpg' is a link"),
        (_tar(tarfile.TarInfo("a.jpg"), tarfile.TarInfo("a.png")), r"2 images \(a\.jpg, a\.png\)"),
        (_tar(tarfile.TarInfo("a.jpg"), tarfile.TarInfo("a.cls")), "'a.cls' is not a class number"),
        (_damaged(), "no header at byte 512"),
    ],
)
def test_what_is_refused(content: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=said):
        index(str(path))
