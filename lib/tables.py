"""What a data set says about its images: views, CSV files, and which row names which image."""
import collections
import csv
import gzip
import os
import zlib

from lib.decode import DICOM, EXTENSIONS, LATERAL, find_images, import_pydicom
from lib.files import fail


def each_once(folder, left_out):
    """Paths of the images below a folder. Of a file and links to it, such as those of an earlier
    --out, the file alone: a film is not in two splits."""
    paths = ["/".join(parts) for parts in find_images(folder, left_out)]
    paths.sort(key=lambda path: not os.path.islink(os.path.join(folder, path)))
    files = {os.path.realpath(os.path.join(folder, path)): path for path in paths}
    left_out["links to other images"] = len(paths) - len(files)
    return sorted(files.values())


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
    return view or ("lateral" if LATERAL.search(path) else "")


def read_tables(paths):
    """Rows {column: text} of CSV files, gzipped or not, joined on the columns that they share. A
    row without a partner stays, the other file's columns blank."""
    rows, blank = [], {}
    for path in paths:
        try:
            with (gzip.open if path.endswith(".gz") else open)(
                    path, "rt", encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
                table = [{name.strip(): row[name].strip() for name in row if name}
                         for row in csv.DictReader(file, restval="")]
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
    # An end of several paths or names is never guessed.
    clear = {key: paths[0] for key, paths in paths_of.items()
             if len(paths) == 1 and len(names_of[key]) < 2}
    rows_of = collections.defaultdict(list)
    for row in rows:
        key = end(row[column])
        if key in clear:
            rows_of[clear[key]].append(row)
        else:
            left_out["rows whose image is not clear" if key in paths_of else
                     "rows without an image"] += 1
    left_out["images: others have the same name"] = len(files) - len(clear)
    left_out["images: without a row"] = len(clear) - len(rows_of)
    return rows_of
