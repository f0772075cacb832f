"""Class folders DATA_ROOT/TASK/{train,val,test}/CLASS from a public set as it is downloaded.

    python prepare.py --images=CXR_png --class_pattern="_([01]).png" --classes="normal=0,tb=1" \\
        --out=data/TB

No patient is in two splits, and the splits have the same mixture of classes. What is not clear is
left out and counted, never guessed. docs/data.md has the command for each public set.
"""
import argparse
import collections
import os
import random
import re
import shutil
import tempfile

from lib.args import BooleanFlag, Parser, at_least, file_path, folder_name, parse_settings
from lib.files import command_line, fail, say, writing
from lib.tables import each_once, find_view, match_rows, read_tables

VIEW_COLUMNS = ("ViewPosition", "View Position", "Frontal/Lateral", "Projection")


def pattern(text):
    """argparse type: a regular expression that ignores case."""
    try:
        return re.compile(text, re.IGNORECASE)
    except re.error as e:
        raise argparse.ArgumentTypeError(f"{text!r} is no regular expression: {e}") from e


def name_equals_label(text):
    """argparse type: 'name=Label,...' as {label: name}; a class may have several labels."""
    pairs = [item.split("=", 1) for item in text.split(",")]
    return {label.strip(): folder_name(name.strip()) for name, label in pairs}


def build_parser():
    """Parser of this program."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--images", type=file_path, required=True, help="folder of the images, at any depth")
    add("--csv", help="CSV files, a comma list: joined on the columns that they share")
    add("--file_column", help="of image names; folders and suffixes may be missing")
    add("--patient_column", help="of patients")
    add("--patient_pattern", type=pattern, help="regular expression of the patient in a path")
    add("--label_column", help="of labels, | between several; None: a column per label, 1 for yes")
    add("--class_pattern", type=pattern, help="instead of --csv: that of the label in a path")
    add("--classes", type=name_equals_label, required=True, help="name=Label,name=Label,...")
    add("--out", type=file_path, required=True, help="DATA_ROOT/TASK, the folder to make")
    add("--val", type=at_least(0, float, 0.4), default=0.1, help="share of the images; 0: none")
    add("--test", type=at_least(0, float, 0.4), default=0.1, help="share of the images; 0: none")
    add("--seed", type=at_least(0), default=0, help="of the division")
    add("--copy", action=BooleanFlag, default=False, help="copy the images instead of linking")
    return parser


def read_rows(args, files):
    """Rows of --csv, or one per path that --class_pattern matches, with all columns of args."""
    if bool(args.csv) == bool(args.class_pattern):
        fail("give either --csv or --class_pattern")
    if args.csv:
        rows = read_tables(os.path.expanduser(path.strip()) for path in args.csv.split(","))
    else:
        found = [(path, args.class_pattern.search(path)) for path in files]
        rows = [{"path": path, "label": m[m.lastindex or 0] if m else ""} for path, m in found]
        args.file_column, args.label_column = "path", "label"
        args.patient_column = args.patient_column or "path"  # each image is a patient of its own
    patient = [] if args.patient_pattern else [args.patient_column]
    labels = [args.label_column] if args.label_column else args.classes
    for name in (args.file_column, *patient, *labels):
        if name not in rows[0]:
            fail(f"no column {name}: give --file_column, --patient_column and --label_column of "
                 + ", ".join(rows[0]))
    return rows


def judge(path, rows, args):
    """(class, patient) of an image by the rows that name it. Of several rows, as of several
    readers, more than half must agree. Raises ValueError with the reason if it is left out."""
    views = [rows[0][name] for name in VIEW_COLUMNS if name in rows[0]]
    view = (views and views[0]) or find_view(args.images, path) or (
        "not given" if views else "frontal")
    if not re.match("(?i)(ap|pa|frontal)(?![a-z])", view):
        raise ValueError(f"not frontal: view {view}")
    votes, others = collections.Counter(), set()
    for row in rows:
        labels = set(re.split(r" *\| *", row[args.label_column])) if args.label_column else {
            label if row[label] in ("1", "1.0") else row[label] for label in args.classes}
        votes.update({args.classes[label] for label in labels if label in args.classes})
        others |= labels - args.classes.keys()
    agreed = sorted(name for name in votes if votes[name] > len(rows) / 2)
    if len(agreed) > 1:
        raise ValueError(f"of several classes: {' and '.join(agreed)}")
    if others & {"-1", "-1.0"}:
        raise ValueError("uncertain: label -1")
    if not agreed:
        raise ValueError("rows disagree" if votes else "blank" if "" in others else "other label")
    patients = (set(args.patient_pattern.findall(path)) if args.patient_pattern else
                {row[args.patient_column] for row in rows})
    if len(patients) != 1 or not all(patients):
        raise ValueError("no patient, or several")
    return agreed[0], patients.pop()


def split_patients(images, shares, seed):
    """{patient: split}. Large patients come first, each to where its classes are filled least."""
    counts = collections.defaultdict(collections.Counter)
    for _, name, patient in images:
        counts[patient][name] += 1
    several = sum(len(own) > 1 for own in counts.values())
    say(f"{several} patients have images of several classes, each of them in one split")
    totals = collections.Counter(name for _, name, _ in images)
    filled, splits = collections.Counter(), {}
    patients = random.Random(seed).sample(sorted(counts), len(counts))
    for patient in sorted(patients, key=lambda p: (-len(counts[p]), -counts[p].total())):
        own = counts[patient].items()
        splits[patient] = min(filter(shares.get, shares), key=lambda split: sum(
            n * (filled[split, name] + n / 2) / max(1, shares[split] * totals[name])
            for name, n in own))
        filled.update({(splits[patient], name): n for name, n in own})
    return splits


def write(images, splits, args, root, task):
    """Make --out, root/task, of links or copies: whole, or not at all."""
    put = shutil.copyfile if args.copy else os.symlink
    with writing(args.out):
        os.makedirs(root, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{task}.", dir=root) as folder:
            for path, name, patient in images:
                file = path.replace("/", "__")  # a folder below a class might be taken for a split
                target = os.path.join(folder, task, splits[patient], name, file)
                os.makedirs(os.path.dirname(target), exist_ok=True)
                put(os.path.join(os.path.abspath(args.images), path), target)
            os.rename(os.path.join(folder, task), args.out)


def main(argv=None):
    args = parse_settings(build_parser(), argv)
    if os.path.isdir(args.out) and os.listdir(args.out):
        fail(f"--out={args.out} is not empty: choose another, or remove it first")
    left_out, images = collections.Counter(), []
    files = each_once(args.images, left_out) or fail(f"no images in --images={args.images}")
    rows = read_rows(args, files)
    for path, of_path in match_rows(rows, args.file_column, files, left_out).items():
        try:
            images.append((path, *judge(path, of_path, args)))
        except ValueError as e:
            left_out[f"images: {e}"] += 1
    say(f"{len(files)} images, {len(rows)} rows; {len(images)} images are used. Left out:")
    for reason, count in sorted((+left_out).items()):
        say(f"{count:>8} {reason}")
    shares = {"train": 1 - args.val - args.test, "val": args.val, "test": args.test}
    splits = split_patients(images, shares, args.seed)
    for name in dict.fromkeys(args.classes.values()):
        for split, share in shares.items():
            members = [who for _, of, who in images if (of, splits[who]) == (name, split)]
            say(f"{name:<15} {split:<5} {len(members):>7} images, {len(set(members))} patients")
            if share and not members:
                fail(f"no image of class {name} for {split}: see what is left out, --val, --test")
    root, task = os.path.split(os.path.normpath(args.out))
    write(images, splits, args, root or ".", task)
    say("next: " + command_line("train_vae.py", data_root=root or ".", task=task))


if __name__ == "__main__":
    main()
