"""Makes the golden tars, as tars really are, and records what webdataset makes of each.

Run with Python 3.11 and webdataset 1.0.2 in this folder: python make_tars.py
"""

import gzip
import io
import json
import tarfile
from pathlib import Path

from webdataset.tariterators import group_by_keys, tar_file_expander

FOLDER = Path(__file__).parent
NOT_MEMBERS = {"__key__", "__url__", "__local_path__"}
# Padding to a block and not to twenty keeps the files small.
tarfile.RECORDSIZE = tarfile.BLOCKSIZE
LONG = "/".join(["a_folder_with_a_long_name"] * 6)


def member(name, content=b"x", kind=tarfile.REGTYPE, link=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    if kind == tarfile.REGTYPE:
        info.size = len(content)
    return info, content


def tar_of(members, form=tarfile.GNU_FORMAT, encoding="utf-8"):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form, encoding=encoding, errors="surrogateescape") as tar:
        for info, content in members:
            tar.addfile(info, io.BytesIO(content) if info.isreg() else None)
    return buffer.getvalue()


def pair(key):
    return [member(f"{key}.jpg", b"j" * 600), member(f"{key}.txt", b"words")]


def sparse(name):
    """A file of 5 bytes at 4096, as GNU tar's old format has it."""
    header = bytearray(tarfile.TarInfo(name).tobuf(tarfile.GNU_FORMAT))
    header[124:136] = b"%011o\0" % 5
    header[156:157] = tarfile.GNUTYPE_SPARSE
    header[386:398], header[398:410] = b"%011o\0" % 4096, b"%011o\0" % 5
    header[483:495] = b"%011o\0" % 4101
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + b"bytes".ljust(512, b"\0")


def pax_sparse(name):
    """The same in the PAX format 1.0: the map stands before the data."""
    content = b"1\n4096\n5\n".ljust(512, b"\0") + b"bytes"
    info, _ = member(f"GNUSparseFile.0/{name}", content)
    info.pax_headers = {
        "GNU.sparse.major": "1",
        "GNU.sparse.minor": "0",
        "GNU.sparse.name": name,
        "GNU.sparse.realsize": "4101",
    }
    return info, content


END = b"\0" * 1024
plain = tar_of(pair("000") + pair("001"))
body = plain[: -len(END)]
ustar = [*pair("u"), member("folder/deep/u.jpg"), member("folder/deep/u.json", b"{}")]
names = [
    "photo.JPG", "photo.Txt", "photo.seg.PNG", "a..jpg", "v1.0/b.jpg", "v1.0/b.txt", "c/d/e.f.g.h", "__x.jpg", "x__y.txt",
    "no_extension", "v1.0/none", "__meta__", "__meta__/x.json", "__index.json__", "k/__y.z__",
]
hidden = [".hidden.jpg", "a/.hidden", "a/._x.jpg", "a.jpg", "b.", "./c.jpg", "./c.txt"]
unicode_names = ["caf\u00e9.jpg", "caf\u00e9.txt", "\u540d\u524d/\u5199\u771f.jpg", "\u0130.JPG", "caf\u0065\u0301.jpg"]
bytes_names = [name.decode("utf-8", "surrogateescape") for name in (b"caf\xe9.jpg", b"caf\xe9.txt", b"caf\xe8.jpg", b"ok.jpg")]

TARS = {
    "ustar": tar_of(ustar, tarfile.USTAR_FORMAT),
    "ustar-prefix": tar_of([member(f"{LONG[:140]}/n.jpg"), member(f"{LONG[:140]}/n.txt")], tarfile.USTAR_FORMAT),
    "pax": tar_of(ustar, tarfile.PAX_FORMAT),
    "pax-long": tar_of([member(f"{LONG}{LONG}/n.jpg"), member(f"{LONG}{LONG}/n.txt"), *pair("after")], tarfile.PAX_FORMAT),
    "gnu-long": tar_of([member(f"{LONG}{LONG}/n.jpg"), member(f"{LONG}{LONG}/n.txt"), *pair("after")]),
    "names": tar_of([member(name) for name in names]),
    "hidden": tar_of([member(name) for name in hidden]),
    "unicode-gnu": tar_of([member(name) for name in unicode_names]),
    "unicode-pax": tar_of([member(name) for name in unicode_names], tarfile.PAX_FORMAT),
    "latin1-gnu": tar_of([member(name) for name in bytes_names]),
    "latin1-pax": tar_of([member(name) for name in bytes_names], tarfile.PAX_FORMAT),
    "links": tar_of([
        member("folder.jpg/", kind=tarfile.DIRTYPE),
        *pair("000"),
        member("000.png", kind=tarfile.SYMTYPE, link="/etc/passwd"),
        member("001.jpg", kind=tarfile.LNKTYPE, link="000.jpg"),
        member("002.jpg", kind=tarfile.SYMTYPE, link=f"{LONG}{LONG}"),
        member("003.jpg", kind=tarfile.FIFOTYPE),
        *pair("004"),
    ]),
    "old-v7": tar_of([member("v.jpg", kind=tarfile.REGTYPE)]).replace(b"ustar  \0", b"\0" * 8, 1),
    "duplicate": tar_of([*pair("000"), member("000.jpg", b"other"), *pair("001")]),
    "apart": tar_of([member("a.jpg"), member("b.jpg"), member("a.txt")]),
    "missing": tar_of([member("a.jpg"), member("b.txt"), *pair("c")]),
    "empty-members": tar_of([member("a.jpg", b""), member("a.txt", b"")]),
    "empty": tar_of([]),
    "no-end": body,
    "one-end-block": body + END[:512],
    "garbage": plain + b"garbage after the end" * 60,
    "two": plain + tar_of(pair("002")),
    "two-without-end": body + tar_of(pair("002")),
    "sparse": sparse("s.jpg") + tar_of([member("s.txt"), *pair("t")]),
    "pax-sparse": tar_of([pax_sparse("s.jpg"), member("s.txt"), *pair("t")], tarfile.PAX_FORMAT),
    "cut-member": body[: 3072 + 300],
    "cut-header": body[:-700],
    "bad-header": body[:2560] + b"\xff" * 512 + body[3072:],
    "gzip": gzip.compress(plain, mtime=0),
    "gzip-two-members": gzip.compress(plain[:1500], mtime=0) + gzip.compress(plain[1500:], mtime=0),
    "gzip-cut": gzip.compress(plain, mtime=0)[:-40],
}


def old_v7(tar):
    """Mends the checksum of a header whose magic was taken away."""
    header = bytearray(tar[:512])
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + tar[512:]


TARS["old-v7"] = old_v7(TARS["old-v7"])


def samples(content):
    """Each sample's key, extensions and sizes, in order; at the end what was raised, if anything was."""
    found = []
    source = [{"url": "x.tar", "stream": io.BytesIO(content)}]
    try:
        for sample in group_by_keys(tar_file_expander(iter(source))):
            key = sample["__key__"].encode("utf-8", "surrogateescape").decode("utf-8", "replace")
            members = {name: len(content) for name, content in sample.items() if name not in NOT_MEMBERS}
            found.append([key, dict(sorted(members.items()))])
    except Exception as error:  # whatever it is: the Rust test says what coffey does instead
        return {"samples": found, "raised": type(error).__name__}
    return {"samples": found, "raised": None}


expected = {name: samples(content) for name, content in TARS.items()}
# A key that ends one shard and begins the next is two samples.
ends = [{"url": f"{n}.tar", "stream": io.BytesIO(tar_of(pair("a")))} for n in range(2)]
assert len(list(group_by_keys(tar_file_expander(iter(ends))))) == 2
(FOLDER / "tars.json").write_text(json.dumps(expected, indent=1) + "\n")
together = tar_of([member(name, content) for name, content in TARS.items()])
(FOLDER / "tars.tar.gz").write_bytes(gzip.compress(together, mtime=0))
print(len(TARS), "tars")
