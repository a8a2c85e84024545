"""Files that are whole or not there, and that say when they were damaged.

Everything that is written takes its name only once it is on the disk: `replacing` and
`write_atomic`. What we write carries a digest: torch files at their end (`save_sealed`,
`load_sealed`), safetensors files in their header (`seal_tensors`, `check_digest`). Files of others
have none, and are read as they are.
"""

import contextlib
import hashlib
import os
import re
import zipfile

import torch


@contextlib.contextmanager
def replacing(path):
    """Yield a temporary path beside `path`; what is written there within is flushed to disk and
    takes the name `path` at the end. Where that fails what was at path stays, nothing else does,
    and an OSError is one sentence."""
    partial = path.with_name(path.name + ".partial")
    try:
        # made here and by nobody else: what a kill left goes, a link is not followed
        partial.unlink(missing_ok=True)
        os.close(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        yield partial
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        # torch says what its writer makes of the system's error, which is behind it
        cause = error.__context__ if isinstance(error, RuntimeError) else error
        if not isinstance(cause, OSError):
            raise
        reason = cause.strerror or str(cause)
        raise OSError(f"{path}: cannot be written ({reason}); what it held before stays") from None


def write_atomic(path, content):
    """Make a file hold `content`, with `replacing`: text, bytes, or a function that writes it to
    the path that it is given."""
    with replacing(path) as partial:
        if callable(content):
            content(partial)
        else:
            partial.write_bytes(content.encode() if isinstance(content, str) else content)


# ---- torch files

# torch.save writes a zip archive, which readers look for from its end: these bytes pass unseen
SEAL = b"sha256 "


class Sealed:
    """A file that torch.save writes to: `seal` ends it with a digest of all that went before."""

    def __init__(self, file):
        self.file, self.digest = file, hashlib.sha256()
        self.flush = file.flush

    def write(self, data):
        self.digest.update(data)
        return self.file.write(data)

    def seal(self):
        self.file.write(SEAL + self.digest.hexdigest().encode())


def save_sealed(state, path):
    """Write a tree of tensors and plain values with torch.save and a digest, atomically."""
    with replacing(path) as partial, open(partial, "wb") as file:
        sealed = Sealed(file)
        torch.save(state, sealed)
        sealed.seal()


def load_sealed(path):
    """Read a torch file on the CPU, after its digest where it has one: a tree. Nothing in it is
    run, and it can take no more memory than it has bytes. Raises ValueError if it is damaged."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        file.seek(-min(size, len(SEAL) + 64 + 22), os.SEEK_END)
        end = file.read()
        sealed = end[22:29] == SEAL and size > len(end)
        if sealed:
            file.seek(0)
            digest, left = hashlib.sha256(), size - len(SEAL) - 64
            while left:
                piece = file.read(min(left, 1 << 24))
                digest.update(piece)
                left -= len(piece)
            if digest.hexdigest().encode() != end[29:]:
                raise ValueError(f"{path}: damaged, its bytes do not fit its digest")
        file.seek(0)
        if file.read(4) == b"PK\x03\x04":
            if not sealed and end[-22:-18] != b"PK\x05\x06":
                raise ValueError(f"{path}: damaged, it does not end as a torch file does")
            with zipfile.ZipFile(path) as archive:
                claimed = sum(member.file_size for member in archive.infolist())
            if claimed > size:
                raise ValueError(f"{path}: damaged, {size} bytes that claim to hold {claimed}")
    return torch.load(path, map_location="cpu", weights_only=True)


# ---- safetensors files

KEY, NO_DIGEST = b'"sha256":"', "0" * 64


def seal_tensors(data):
    """The bytes of a safetensors file whose metadata hold {"sha256": NO_DIGEST}, with a digest of
    all of them in that place."""
    # hidden in a string of other metadata the key would be behind a backslash
    digest = hashlib.sha256(data).hexdigest().encode()
    return data.replace(KEY + NO_DIGEST.encode(), KEY + digest, 1)


def check_digest(path):
    """Raise ValueError if a safetensors file holds a digest that its bytes do not have. Files of
    others have none, nor has what we once wrote; a damaged digest still leaves a trace."""
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        head = file.read(min(size, 100_000_000))  # the format's own limit
        found = re.search(re.escape(KEY) + rb"([0-9a-f]{64})", head)
        if found is None:
            if re.search(rb'sha256":"|":"[0-9a-f]{64}"', head):
                raise ValueError(f"{path}: damaged, its digest cannot be read; fetch it again")
            return
        digest = hashlib.sha256(size.to_bytes(8, "little"))
        digest.update(head[: found.start(1)] + NO_DIGEST.encode() + head[found.end(1) :])
        while piece := file.read(1 << 24):
            digest.update(piece)
    if digest.hexdigest().encode() != found[1]:
        raise ValueError(f"{path}: damaged, its bytes do not fit its digest; fetch it again")
