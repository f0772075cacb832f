"""What a data set ships: images and their views, CSV files, and which row names which image."""
import collections
import csv
import gzip
import os
import re
import zlib

from lib.decode import DICOM, EXTENSIONS, import_pydicom, may_be_image
from lib.files import fail


def find_images(folder, left_out):
    """Paths below `folder` of its images, each file once; left_out counts the others by reason."""
    def unreadable(e):
        fail(f"cannot read {e.filename}: {e.strerror}")

    found, seen = {}, set()
    for where, folders, names in os.walk(folder, followlinks=True, onerror=unreadable):
        folders.sort()
        if os.path.realpath(where) in seen:  # by a link, which may lead to a folder above it
            folders.clear()
            continue
        seen.add(os.path.realpath(where))
        for name in sorted(names):
            path = os.path.relpath(os.path.join(where, name), folder)
            target = os.path.realpath(os.path.join(where, name))
            if re.search(r"(?i)/\.|masks?[/.]|/(segmentations?|@eadir)/", f"/{path}"):
                left_out["hidden files or masks"] += 1
            elif not os.path.exists(target):
                left_out["links without a target"] += 1
            elif not may_be_image(path):
                left_out["files that are no images by their suffix"] += 1
            elif found.setdefault(target, path) != path:
                left_out["links to an image that is there itself"] += 1
    return sorted(found.values())


def find_view(folder, path):
    """View of the image at `path` below a folder: ViewPosition of DICOM, else `lateral` if the path
    says so, else "". Raises ValueError if DICOM cannot be read."""
    view = ""
    if os.path.splitext(path)[1].lower() not in EXTENSIONS - DICOM:
        pydicom = import_pydicom()
        try:
            dataset = pydicom.dcmread(os.path.join(folder, path), stop_before_pixels=True)
            view = str(dataset.get("ViewPosition") or "")
        except Exception as e:  # it has many for damaged files
            raise ValueError("damaged DICOM") from e
    named = re.search("(?i)(?<![a-z])lat(eral)?(?![a-z])", path)
    return view or ("lateral" if named else "")


def read_tables(paths):
    """Rows {column: text} of CSV files, gzipped or not, with commas, semicolons or tabs, joined on
    the columns that they share. A row without a partner stays, the other file's columns blank."""
    rows, blank = [], {}
    for path in paths:
        try:
            with (gzip.open if path.endswith(".gz") else open)(
                    path, "rt", encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
                lines = file.readlines() or [""]
            reader = csv.DictReader(lines, restval="", delimiter=max(",;\t", key=lines[0].count))
            table = [{name.strip(): row[name].strip() for name in row if name} for row in reader]
        except (OSError, EOFError, zlib.error, csv.Error) as e:
            fail(f"cannot read {path}: {getattr(e, 'strerror', None) or e}")
        shared = [name for name in (table or [{}])[0] if name in blank or not rows]
        if not shared:
            fail(f"{path} has no rows, or no column of the CSV file before it")
        partners = collections.defaultdict(lambda: ([], []))
        for side, part in enumerate((rows, table)):
            for row in part:
                partners[tuple(row[name] for name in shared)][side].append(row)
        blank |= dict.fromkeys(table[0], "")
        rows = [blank | old | new for olds, news in partners.values()
                for old in olds or [{}] for new in news or [{}]]
    return rows


def match_rows(rows, column, files, left_out):
    """{path: rows whose `column` names it}; left_out counts by reason what has no such partner.

    Names and paths are compared without suffixes, in as many last parts as lets any name meet a
    path: train.csv of CheXpert begins its names with a folder that may have another name here.
    """
    def end(path):
        stem, suffix = os.path.splitext(path)
        return "/".join((stem if suffix.lower() in EXTENSIONS else path).split("/")[-depth:])

    depth = 1 + max(row[column].count("/") for row in rows)
    while depth > 1 and {end(row[column]) for row in rows}.isdisjoint(map(end, files)):
        depth -= 1
    names_of, paths_of = collections.defaultdict(set), collections.defaultdict(list)
    for row in rows:
        names_of[end(row[column])].add(row[column])
    for path in files:
        paths_of[end(path)].append(path)
    rows_of = {paths[0]: [] for paths in paths_of.values() if len(paths) == 1}
    left_out["images: others have the same name"] += len(files) - len(rows_of)
    for row in rows:
        paths = paths_of.get(end(row[column]), [])
        if len(paths) == len(names_of[end(row[column])]) == 1:
            rows_of[paths[0]].append(row)
        else:
            left_out["rows whose image is not clear" if paths else "rows without an image"] += 1
    return rows_of
