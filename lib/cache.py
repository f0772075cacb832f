"""Arrays that take long to make: rows in NAME.npy and one status byte per row in NAME.status.

Rows are on the disk before the byte that says so. A build that was killed is thus continued by the
next start, and whether a cache is complete is known without reading a row.
"""
import os
import pathlib
from typing import NamedTuple

import numpy as np

from lib import run
from lib.files import fail, first_line, make_folder, take_lock, writing

TODO, DONE = 0, 1  # status of a row; other values are up to the caller
CHUNK = 128  # rows that are written at once: what a kill can cost a process


class CachedArray(NamedTuple):
    """A .npy file and the status of its rows, uint8 [N]."""

    path: str
    status: np.ndarray

    def rows(self, indices):
        """Copy of some rows, for an array of indices or a slice."""
        try:  # a map that lives on would keep what was read in memory
            return np.array(np.lib.format.open_memmap(self.path, "r")[indices])
        except (OSError, ValueError) as e:
            fail(f"cache {self.path} was removed or damaged ({first_line(e)}): type the same "
                 "command again")


def cached_array(ctx, folder, name, shape, dtype, make, label):
    """CachedArray `name` of this shape and dtype in `folder`, whose missing rows all ranks make
    together. make(indices) returns (rows, status of each or of all); a row of status TODO is tried
    again by the next start. label: of the progress line. Exits with an error if a file cannot be
    written; what is done stays."""
    path = pathlib.Path(folder, f"{name}.npy")
    status_path, lock = path.with_suffix(".status"), None

    def begin():
        nonlocal lock  # on rank 0 until all ranks are done; other runs wait for it
        status = _read_status(path, shape, dtype)
        if status is None or TODO in status:
            lock = take_lock(make_folder(folder) / f"{name}.lock", path, True)
            status = _read_status(path, shape, dtype)  # perhaps made meanwhile
        if status is None:
            status = np.zeros(shape[0], np.uint8)
            with writing(path):
                for old in (status_path, path):  # a run that reads the old rows keeps them
                    old.unlink(missing_ok=True)
                np.lib.format.open_memmap(path, "w+", dtype, shape)
                status_path.write_bytes(status)
        return status

    status = ctx.on_main(begin)
    todo = np.flatnonzero(status == TODO)
    if len(todo):
        header = np.lib.format.open_memmap(path, "r").offset
        progress, stride = run.Progress(label, len(todo)), CHUNK * ctx.world_size
        for start in range(CHUNK * ctx.rank, len(todo), stride):
            indices = todo[start:start + CHUNK]
            rows, status[indices] = make(indices)
            _write(path, header, indices, np.asarray(rows, dtype))
            _write(status_path, 0, indices, status[indices])
            progress.update(min(start + stride, len(todo)))
        # Not from the file: a network disk may show what other machines wrote late.
        status = np.maximum.reduce(ctx.gather_objects(status))
    if lock:
        lock.close()
    return CachedArray(str(path), status)


def _read_status(path, shape, dtype):
    """Status bytes of a cache; None if its two files are not there or not whole."""
    try:
        array = np.lib.format.open_memmap(path, "r")
        status = np.fromfile(path.with_suffix(".status"), np.uint8)
        found = array.shape, array.dtype, len(status)
        return status if found == (shape, dtype, shape[0]) else None
    except Exception:  # whatever NumPy raises on a damaged header
        return None


def _write(path, offset, indices, rows):
    """Put rows of an array that begins at `offset` into a file, and the file on the disk."""
    # Not through a writable map: there a full disk is a SIGBUS, not an error.
    with writing(path), open(path, "r+b") as f:
        for index, row in zip(indices.tolist(), rows, strict=True):
            f.seek(offset + index * row.nbytes)
            f.write(row.tobytes())
        f.flush()
        os.fsync(f.fileno())
