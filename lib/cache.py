"""Arrays that take long to make: rows in NAME.npy and one status byte per row in NAME.status.

Rows are on the disk before the byte that says so. A build that was killed is thus continued by the
next start, and whether a cache is complete is known without reading a row.
"""
import os
import pathlib
from typing import NamedTuple

import numpy as np

from lib import run
from lib.files import fail, first_line, make_folder, notice, take_lock

TODO, DONE = 0, 1  # status of a row; other values are up to the caller
CHUNK = 128  # rows that are written at once: what a kill can cost a process


class CachedArray(NamedTuple):
    """A .npy file and the status of its rows, uint8 [N]."""

    path: str
    status: np.ndarray

    def rows(self, indices):
        """Copy of some rows, for an array of indices. A map lives for 64 of them only: what it has
        touched counts as memory, and the system reads far more than the rows."""
        parts = [indices[i:i + 64] for i in range(0, max(1, len(indices)), 64)]
        return np.concatenate([np.lib.format.open_memmap(self.path, "r")[part] for part in parts])


def cached_array(ctx, folder, name, shape, dtype, make, label, needed=True):
    """CachedArray `name` of this shape and dtype in `folder`. All ranks must call it: together they
    make the rows that are missing.

    make(indices) returns (rows, uint8 status of each); a row of status TODO is tried again by the
    next start. needed: bool [N], rows that must be there. label: of the progress line. Exits with
    an error if a file cannot be written; what is done stays.
    """
    path = pathlib.Path(folder, f"{name}.npy")
    lock = None  # on rank 0 until all ranks are done; other runs wait for it

    def begin():
        nonlocal lock
        status = _read_status(path, shape, dtype)
        if status is None or ((status == TODO) & needed).any():
            lock = take_lock(make_folder(folder) / f"{name}.lock", path, True)
            status = _read_status(path, shape, dtype, notice)  # perhaps made meanwhile
        return _create(path, shape, dtype) if status is None else status

    status = ctx.on_main(begin)
    todo = np.flatnonzero((status == TODO) & needed)
    if len(todo):
        chunks = np.split(todo, np.flatnonzero(np.diff(todo // CHUNK)) + 1)
        made = _make_rows(path, dtype, make, chunks[ctx.rank::ctx.world_size], ctx, label)
        # Not from the file: a network disk may show what other machines wrote late.
        for indices, states in sum(ctx.gather_objects(made), []):
            status[indices] = states
        ctx.on_main(lambda: _write(_status_path(path), [(0, status.tobytes())]))
    if lock:
        lock.close()
    return CachedArray(str(path), status)


def _status_path(path):
    return path.with_suffix(".status")


def _read_status(path, shape, dtype, say=lambda text: None):
    """Status bytes of a cache; None if there are none or it is damaged, which `say` is told."""
    if not (path.exists() and _status_path(path).exists()):
        return None
    try:
        array = np.lib.format.open_memmap(path, "r")
        status = np.fromfile(_status_path(path), np.uint8)
        found = array.shape, array.dtype, array.offset + array.nbytes, len(status)
        if found != (shape, dtype, path.stat().st_size, shape[0]):
            raise ValueError(f"its files are not of {shape[0]} rows {np.dtype(dtype)} {shape[1:]}")
        return status
    except Exception as e:  # whatever NumPy raises on a damaged header
        say(f"cache {path} is damaged ({first_line(e)}): building it again")
        return None


def _create(path, shape, dtype):
    """Make the files for rows that are all still to do; returns their status."""
    try:
        for old in (_status_path(path), path):  # a run that reads the old rows keeps them
            old.unlink(missing_ok=True)
        np.lib.format.open_memmap(path, "w+", dtype, shape)
        _status_path(path).write_bytes(bytes(shape[0]))
    except OSError as e:
        _fail(path, e)
    return np.zeros(shape[0], np.uint8)


def _make_rows(path, dtype, make, chunks, ctx, label):
    """Make and store these chunks of rows: [(indices, status of each)]."""
    progress = run.Progress(ctx, label, sum(map(len, chunks)))
    array = np.lib.format.open_memmap(path, "r")
    made, done = [], 0
    for indices in chunks:
        rows, states = make(indices)
        _write(path, ((array.offset + i * array.strides[0], row.tobytes())
                      for i, row in zip(indices.tolist(), np.asarray(rows, dtype), strict=True)))
        _write(_status_path(path), ((i, state.tobytes()) for i, state in zip(
            indices.tolist(), states, strict=True)))
        made.append((indices, states))
        done += len(indices)
        progress.update(done)
    progress.clear()
    return made


def _write(path, blocks):
    """Put (offset, bytes) into a file, and the file on the disk."""
    try:
        # Not through a writable map: there a full disk is a SIGBUS, not an error.
        with open(path, "r+b") as f:
            for offset, block in blocks:
                f.seek(offset)
                f.write(block)
            f.flush()
            os.fsync(f.fileno())
    except OSError as e:
        _fail(path, e)


def _fail(path, error):
    fail(f"cannot write {path}: {error.strerror}; free some space or choose another --output_root. "
         "What is done stays")
