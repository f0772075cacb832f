"""prepare.py on seven public sets, synthesised in the form in which they are downloaded."""
import collections
import csv
import gzip
import importlib
import os
import re
import shlex
import signal
import time

import numpy as np
import pytest
from conftest import ROOT, only_error, start
from PIL import Image
from test_files import write_dicom

import data

HAS_PYDICOM = importlib.util.find_spec("pydicom") is not None
SPLITS = ("train", "val", "test")


# --- the sets -----------------------------------------------------------------------------------


def film(path):
    """A small PNG, JPEG or DICOM file, each with other pixels; (path, view) with ViewPosition."""
    path, view = path if isinstance(path, tuple) else (path, None)
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(list(path.name.encode()))
    pixels = rng.integers(0, 256, (16, 16), dtype=np.uint8)
    if path.suffix in (".dcm", ".dicom"):
        write_dicom(path, pixels, 8, **({"ViewPosition": view} if view else {}))
    else:
        Image.fromarray(pixels).save(path)
    return path


def table(path, columns, rows, compress=False):
    """Write a CSV file; columns: comma list, as in the file's own header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with (gzip.open if compress else open)(path, "wt", newline="") as file:
        file.write(columns + "\n")
        csv.writer(file).writerows(rows)


def nih(root):
    """ChestX-ray14: one CSV beside images_001/images, ...; labels separated by |."""
    rows, patients = [], {}
    for patient in range(1, 61):
        for visit in range(1 + patient % 3):  # some patients are in two classes
            name = f"{patient:08d}_{visit:03d}.png"
            label = ("No Finding", "Effusion", "Effusion|Mass")[(patient // 3 + visit) % 3]
            path = f"images_{1 + patient // 40:03d}/images/{name}"
            film(root / path)
            rows.append([name, label, visit, patient, 50, "M", "PA" if visit else "AP", 1, 1, 1, 1])
            patients[path] = str(patient)
    for name, label in (("00000091_000.png", "Mass"), ("00000092_000.png", "Hernia|Edema"),
                        ("00000093_000.png", "Effusion|No Finding")):
        film(root / "images_002/images" / name)
        rows.append([name, label, 0, int(name[:8]), 50, "F", "PA", 1, 1, 1, 1])
    rows.append(["00000099_000.png", "Effusion", 0, 99, 50, "F", "PA", 1, 1, 1, 1])  # no file
    film(root / "images_002/images/00000098_000.png")  # no row
    (root / "README_CHESTXRAY.pdf").write_text("")
    table(root / "Data_Entry_2017.csv",
          "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,"
          "View Position,OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y],", rows)
    return patients, {
        "other label": 2, "several classes: effusion and normal": 1,
        "rows without an image": 1, "without a row": 1, "*.pdf": 1, "*.csv": 1}


FINDINGS = ("No Finding,Enlarged Cardiomediastinum,Cardiomegaly,Lung Opacity,Lung Lesion,Edema,"
            "Consolidation,Pneumonia,Atelectasis,Pneumothorax,Pleural Effusion,Pleural Other,"
            "Fracture,Support Devices")


def findings(**values):
    """Cells of FINDINGS, blank but for these (No_Finding for No Finding)."""
    return [values.get(name.replace(" ", "_"), "") for name in FINDINGS.split(",")]


def chexpert(root):
    """CheXpert: train/patient/study/view; a column per finding; the patient is in the path only."""
    rows, patients = [], {}

    def put(patient, study, view, cells):
        path = f"train/patient{patient:05d}/study{study}/{view}.jpg"
        film(root / path)
        side = "Lateral" if "lateral" in view else "Frontal"
        rows.append([f"CheXpert-v1.0-small/{path}", "Female", 60, side, "AP" * (side == "Frontal"),
                     *cells])
        return path

    for patient in range(1, 51):
        for study in range(1, 2 + patient % 2):
            cells = (findings(No_Finding="1.0", Support_Devices="1.0") if (patient + study) % 2
                     else findings(Pleural_Effusion="1.0", Edema="-1.0", No_Finding=""))
            path = put(patient, study, "view1_frontal", cells)
            patients[path] = f"patient{patient:05d}"
            if study == 1:
                put(patient, study, "view2_lateral", cells)
    put(91, 1, "view1_frontal", findings(Pleural_Effusion="-1.0"))
    put(92, 1, "view1_frontal", findings(Edema="1.0"))
    put(93, 1, "view1_frontal", findings(Pleural_Effusion="0.0", No_Finding="0.0"))
    put(94, 1, "view1_frontal", findings(Pleural_Effusion="1.0", No_Finding="1.0"))
    rows.append(["CheXpert-v1.0-small/train/patient00095/study1/view1_frontal.jpg", "Male", 60,
                 "Frontal", "AP", *findings(No_Finding="1.0")])
    film(root / "valid/patient64541/study1/view1_frontal.jpg")
    table(root / "train.csv", f"Path,Sex,Age,Frontal/Lateral,AP/PA,{FINDINGS}", rows)
    return patients, {
        "not frontal: view Lateral": 50, "uncertain": 1, "blank": 1, "other label": 1,
        "several classes": 1, "rows without an image": 1, "without a row": 1,
        "*.csv": 1}


def mimic(root):
    """MIMIC-CXR-JPG: labels by study in one CSV, files and views in the other, both gzipped."""
    images, labels, patients = [], [], {}
    for i in range(60):
        subject, study = 10000032 + i // 2, 50414267 + i
        for j, view in enumerate(("PA", "LATERAL") if i % 3 else ("AP",)):
            name = f"02aa804e-bde0afdd-{i:08x}-{j:08x}"
            path = f"files/p{str(subject)[:2]}/p{subject}/s{study}/{name}.jpg"
            film(root / path)
            images.append([name, subject, study, "CHEST (PA AND LAT)", view, 3056, 2544])
            if view != "LATERAL":
                patients[path.removeprefix("files/")] = str(subject)
        labels.append([subject, study, *(findings(Pneumonia="1.0") if i % 2 else
                                         findings(No_Finding="1.0"))])
    subject, study = 19999999, 59999999
    for name, view in (("unlabelled", "PA"), ("viewless", "")):
        film(root / f"files/p19/p{subject}/s{study}/{name}.jpg")
        images.append([name, subject, study, "CHEST", view, 1, 1])
        study += 1
    labels.append([subject, study - 1, *findings(Pneumonia="1.0")])
    labels.append([subject, 1, *findings(Pneumonia="1.0")])  # a study without a film
    table(root / "mimic-cxr-2.0.0-metadata.csv.gz",
          "dicom_id,subject_id,study_id,PerformedProcedureStepDescription,ViewPosition,Rows,"
          "Columns", images, compress=True)
    table(root / "mimic-cxr-2.0.0-chexpert.csv.gz", f"subject_id,study_id,{FINDINGS}", labels,
          compress=True)
    return patients, {
        "not frontal: view LATERAL": 40, "not frontal: view not given": 1, "blank": 1,
        "rows without an image": 1}


def rsna(root):
    """RSNA Pneumonia: DICOM files, a row for each box, of one patient each."""
    rows, patients = [], {}
    for i in range(40):
        name = f"0004cfab-14fd-4e49-80ba-{i:012x}"
        film((root / f"stage_2_train_images/{name}.dcm", "AP" if i % 2 else "PA"))
        rows += [[name, "Lung Opacity"]] * (1 + i % 4) if i % 3 == 0 else [[name, "Normal"]]
        patients[f"{name}.dcm"] = name
    film((root / "stage_2_train_images/lateral-one.dcm", "LL"))
    (root / "stage_2_train_images/broken.dcm").write_bytes(b"no DICOM")
    rows += [["lateral-one", "Normal"], ["broken", "Normal"]]
    film((root / "stage_2_train_images/other.dcm", "PA"))
    rows.append(["other", "No Lung Opacity / Not Normal"])
    table(root / "stage_2_detailed_class_info.csv", "patientId,class", rows)
    return patients, {"not frontal: view LL": 1, "damaged DICOM": 1, "other label": 1}


def vindr(root):
    """VinDr-CXR: DICOM files without ViewPosition, a row for each of three readers."""
    rows, patients = [], {}
    for i in range(40):
        name = f"{i:032x}"
        film((root / f"train/{name}.dicom", None))
        effusion = i % 4 == 0  # one reader in three sees it otherwise
        for reader in range(3):
            yes = effusion != (reader == 2 and i % 3 == 0)
            rows.append([name, f"R{reader + 8}", 0, int(yes), int(not yes)])
        patients[f"{name}.dicom"] = name
    film((root / "train/split.dicom", None))
    rows += [["split", "R1", 1, 0, 0], ["split", "R2", 0, 1, 0], ["split", "R3", 0, 0, 1]]
    table(root / "annotations/image_labels_train.csv",
          "image_id,rad_id,Aortic enlargement,Pleural effusion,No finding", rows)
    return patients, {"rows disagree": 1}


def montgomery(root, prefix="MCUCXR", masks=True):
    """Montgomery: the label is the last digit of the name; masks have the names of the films."""
    patients = {}
    for i in range(40):
        name = f"{prefix}_{i:04d}_{int(i % 5 == 0)}.png"
        film(root / "CXR_png" / name)
        (root / "ClinicalReadings").mkdir(exist_ok=True)
        (root / "ClinicalReadings" / name.replace(".png", ".txt")).write_text("Patient's Sex: F")
        for side in ("leftMask", "rightMask") if masks else ():
            film(root / "ManualMask" / side / name)
        patients[f"CXR_png/{name}"] = name
    return patients, {"hidden or masks": 80 * masks, "*.txt": 40}


def shenzhen(root):
    """Shenzhen: as Montgomery, without masks."""
    return montgomery(root, "CHNCXR", masks=False)


def documented(name):
    """Flags of the command in docs/data.md under a comment that begins or ends with a name."""
    text = (ROOT / "docs/data.md").read_text().replace("\\\n", "")
    return shlex.split(re.search(rf"    #.*\b{name}\b.*\n(.*)\n", text, re.IGNORECASE)[1])


SETS = [pytest.param(of, id=of.__name__, marks=[pytest.mark.skipif(
    of in (rsna, vindr) and not HAS_PYDICOM, reason="its films are DICOM: no pydicom")])
    for of in (nih, chexpert, mimic, rsna, vindr, montgomery, shenzhen)]


# --- what comes out -----------------------------------------------------------------------------


def listed(out):
    """{(split, class): paths below the class} as training reads a prepared folder."""
    paths, classes = collections.defaultdict(list), None
    for split in SPLITS:
        listing = data.scan(out.parent, out.name, split, classes)
        classes = classes or listing.class_names
        for file in listing.files:
            path = file.path.split("/", 3)[3]
            assert "/" not in path
            paths[split, file.class_name].append(path.replace("__", "/"))
    return paths


@pytest.mark.parametrize("build", SETS)
def test_a_set_as_downloaded_becomes_class_folders(build, tmp_path, quick):
    patients, left_out = build(tmp_path)
    flags = documented(build.__name__)
    result = quick("prepare.py", *flags, "--out=data/SET", "--val=0.2", cwd=tmp_path)
    assert result.code == 0, result.err
    paths = listed(tmp_path / "data/SET")
    assert len(paths) == 6

    # Every image that has a class is in one split, as a link to itself, and no other is.
    found = [path for group in paths.values() for path in group]
    assert sorted(found) == sorted(patients)
    for split, name in paths:
        for path in paths[split, name]:
            link = tmp_path / "data/SET" / split / name / path.replace("/", "__")
            assert link.is_symlink() and link.is_file() and str(link.resolve()).endswith(path)

    # No patient is in two splits, and a class has the same share in all.
    where = collections.defaultdict(set)
    for (split, _), group in paths.items():
        for path in group:
            where[patients[path]].add(split)
    assert all(len(splits) == 1 for splits in where.values())
    for name in {name for _, name in paths}:
        counts = [len(paths[split, name]) for split in SPLITS]
        for count, share in zip(counts, (0.7, 0.2, 0.1), strict=True):
            assert abs(count - max(1, share * sum(counts))) <= 2

    # What it prints is what is there, and what is left out adds up to all files and rows.
    for (split, name), group in paths.items():
        assert re.search(rf"{name} +{split} +{len(group)} images, ", result.out)
    lines = re.findall(r"^ +(\d+) (\D.*)$", result.out, re.MULTILINE)
    counted = {reason: int(count) for count, reason in lines}
    for reason, count in left_out.items():
        assert sum(n for text, n in counted.items() if reason in text) == count, reason
    images = int(re.search(r"(\d+) images, ", result.out)[1])
    assert images == len(found) + sum(n for text, n in counted.items() if "images:" in text)
    assert "next: python train_vae.py --data_root=data --task=SET" in result.out


def small(root, count=24, **changes):
    """A set of PNG files with set.csv (file,patient,finding); flags. changes: of the flags."""
    rows = []
    for i in range(count):
        film(root / f"films/{i:03d}.png")
        rows.append([f"{i:03d}.png", i // 2, ("clear", "sick")[i // 2 % 2]])
    table(root / "set.csv", "file,patient,finding", rows)
    flags = {"images": "films", "csv": "set.csv", "file_column": "file",
             "patient_column": "patient", "label_column": "finding",
             "classes": "normal=clear,tb=sick", "out": "data/SET"} | changes
    return [f"--{name}={value}" for name, value in flags.items() if value is not None]


def tree(folder):
    """{path below a folder: whether it is a link} of all files."""
    return {str(p.relative_to(folder)): p.is_symlink() for p in folder.rglob("*") if not p.is_dir()}


def edited(function):
    """A variation of small(): its CSV file after function(bytes)."""
    def edit(root):
        (root / "set.csv").write_bytes(function((root / "set.csv").read_bytes()))
    return edit


def nested(root):
    """The films in folders with another name than those in the CSV file begin with."""
    (root / "downloads/batch 1").mkdir(parents=True)
    (root / "films").rename(root / "downloads/batch 1/films")
    edited(lambda text: text.replace(b"\n0", b"\nset-v1.0/films/0"))(root)
    return ["--images=downloads"]


def capitals(root):
    for path in (root / "films").iterdir():
        path.rename(path.with_suffix(".PNG"))


def linked(root):
    (root / "a link").symlink_to(root / "films")
    (root / "films/alias.png").symlink_to(root / "films/000.png")
    return ["--images=."]  # which has the links of the first --out, too


def in_two_files(root):
    header, *lines = (root / "set.csv").read_text().splitlines()
    for name, part in (("train.csv", lines[:13]), ("valid.csv", lines[13:])):
        (root / name).write_text("\n".join([header, *part]))
    return ["--csv=train.csv, valid.csv"]


VARIATIONS = {
    "BOM": edited(lambda text: b"\xef\xbb\xbf" + text),
    "CRLF": edited(lambda text: text.replace(b"\n", b"\r\n")),
    "semicolons": edited(lambda text: text.replace(b",", b";")),
    "tabs": edited(lambda text: text.replace(b",", b"\t")),
    "quotes": edited(lambda text: re.sub(rb"(\w+)$", rb'"\1"', text, flags=re.MULTILINE)),
    "comma in quotes": edited(lambda text: text.strip().replace(b"\r\n", b',"a, b"\r\n')),
    "blanks": edited(lambda text: text.replace(b",", b" , ")),
    "no suffix": edited(lambda text: text.replace(b".png", b"")),
    "no UTF-8": edited(lambda text: text.replace(b"finding", b"finding,gr\xf6\xdfe")),
    "folders": nested,
    "two files": in_two_files,
    "upper case": capitals,
    "links": linked,
    "absolute": lambda root: [f"--images={root}/films", f"--out={root}/data/SET/"],
}


@pytest.mark.parametrize("name", VARIATIONS)
def test_how_a_set_is_written_changes_nothing(name, tmp_path, quick):
    argv, groups = small(tmp_path), []
    for task, change in (("PLAIN", lambda root: None), ("SET", VARIATIONS[name])):
        result = quick("prepare.py", *argv, f"--out=data/{task}", *(change(tmp_path) or ()),
                       cwd=tmp_path)
        assert result.code == 0, result.err
        paths = [re.split("/|__", path.lower()) for path in tree(tmp_path / "data" / task)]
        groups.append(sorted((split, of, name) for split, of, *_, name in paths))
    assert groups[0] == groups[1]


def test_the_seed_decides_who_is_where_of_links_and_copies_alike(tmp_path, quick):
    argv = small(tmp_path)
    for task, more in (("A", ()), ("B", ["--copy"]), ("C", ["--seed=1"]), ("D", ["--test=0"])):
        assert quick("prepare.py", *argv, f"--out=data/{task}", *more, cwd=tmp_path).code == 0
    a, b, c, d = (tree(tmp_path / "data" / task) for task in "ABCD")
    assert a.keys() == b.keys() != c.keys() and len(a) == len(c) == len(d) == 24
    assert all(a.values()) and not any(b.values())  # copies do not need the download
    assert {path.split("/")[0] for path in d} == {"train", "val"}


def test_splits_are_even_with_large_and_two_class_patients(tmp_path, quick):
    argv, rows = small(tmp_path), []
    for patient in range(81):
        for i in range(9 if patient < 21 else 1):  # patient 0 has both classes
            film(tmp_path / f"films/{patient}_{i}.png")
            label = ("clear", "sick")[(i if patient == 0 else patient) % 2]
            rows.append([f"{patient}_{i}", patient, label])
    table(tmp_path / "set.csv", "file,patient,finding", rows)
    result = quick("prepare.py", *argv, cwd=tmp_path)
    assert "1 patients have images of several classes" in result.out
    paths = [path.split("/") for path in tree(tmp_path / "data/SET")]
    assert len({split for split, _, name in paths if name.startswith("0_")}) == 1
    counts = collections.Counter((split, name) for split, name, _ in paths)
    for (split, name), count in counts.items():
        total = sum(counts[other, name] for other in SPLITS)
        assert abs(count - (0.8 if split == "train" else 0.1) * total) < 1.5


def test_a_film_is_lateral_if_only_its_name_says_so(tmp_path, quick):
    argv = small(tmp_path, csv=None, file_column=None, patient_column=None, label_column=None,
                 class_pattern="(clear|sick)", patient_pattern="^p[0-9]+")
    for patient in range(20):
        for view in ("frontal", "view2_lateral", "x-lat", "bilateral_effusion"):
            film(tmp_path / f"lateral/p{patient}/{('clear', 'sick')[patient % 2]}/{view}.png")
    result = quick("prepare.py", *argv, "--images=lateral", cwd=tmp_path)
    assert "40 images: not frontal: view lateral" in result.out
    names = collections.Counter(path.rsplit("__", 1)[1] for path in tree(tmp_path / "data/SET"))
    assert names == {"frontal.png": 20, "bilateral_effusion.png": 20}


def test_names_that_are_not_unique_are_left_out_and_counted(tmp_path, quick):
    argv = small(tmp_path)
    film(tmp_path / "films/again/003.png")
    film(tmp_path / "films/again/new.png")
    result = quick("prepare.py", *argv, cwd=tmp_path)
    for line in ("2 images: others have the same name", "1 images: without a row",
                 "1 rows whose image is not clear"):
        assert line in result.out
    assert len(tree(tmp_path / "data/SET")) == 23


def test_no_row_is_taken_for_another_patients_file(tmp_path, quick):
    argv = small(tmp_path)
    for patient in range(30, 42):
        film(tmp_path / f"films/patient{patient}/study1/view1.png")
    rows = [[f"set/patient{patient}/study1/view1.png", patient, ("clear", "sick")[patient % 2]]
            for patient in range(31, 43)]  # 30 has no row, 42 no file
    table(tmp_path / "set.csv", "file,patient,finding", rows)
    result = quick("prepare.py", *argv, cwd=tmp_path)
    paths = tree(tmp_path / "data/SET")
    assert {re.search("patient[0-9]+", path)[0] for path in paths} == {
        f"patient{patient}" for patient in range(31, 42)}
    assert "1 rows without an image" in result.out and "25 images: without a row" in result.out
    film(tmp_path / "lonely/view1.png")  # it may be any of them
    result = quick("prepare.py", *argv, "--images=lonely", "--out=data/LONELY", cwd=tmp_path)
    assert "12 rows whose image is not clear" in result.out and result.code != 0


ERRORS = {
    "column": (["--label_column=Finding"], "no column Finding: give --file_column"),
    "labels as columns": (["--label_column=None"], "no column clear"),
    "no patient": (["--patient_column=None"], "no column None: give --file_column, --patient_col"),
    "no CSV": (["--csv=None"], "either --csv or --class_pattern"),
    "two sources": (["--class_pattern=x"], "either --csv or --class_pattern"),
    "column without CSV": (["--csv=None", "--class_pattern=.", "--patient_column=patient"],
                           "no column patient"),
    "match": (["--csv=None", "--patient_column=None", "--class_pattern=([a-z]+)_"],
              "no image of class normal"),
    "CSV": (["--csv=nowhere.csv"], "nowhere.csv: No such file"),
    "empty CSV": (["--csv=empty.csv"], "empty.csv has no rows"),
    "damaged CSV": (["--csv=bad.csv.gz"], "cannot read bad.csv.gz"),
    "other CSV": (["--csv=set.csv,other.csv"], "other.csv has no rows, or no column of"),
    "images": (["--images=nowhere"], "No such file or directory: 'nowhere'"),
    "no images": (["--images=nothing"], "no images in --images=nothing"),
    "label": (["--classes=normal=clear,tb=ill"], "no image of class tb for train"),
    "class name": (["--classes=a/b=clear,tb=sick"], "a/b"),
    "classes": (["--classes=clear,sick"], "name=Label"),
    "pattern": (["--class_pattern=(", "--csv=None"], "no regular expression"),
    "out": (["--out=films"], "films is not empty"),
    "out file": (["--out=set.csv/SET"], "cannot write set.csv/SET"),
    "too few": (["--csv=few.csv"], "no image of class normal for val"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_is_one_line_and_nothing_is_made(name, tmp_path, quick):
    argv = small(tmp_path)
    (tmp_path / "nothing").mkdir()
    (tmp_path / "empty.csv").write_text("")
    packed = gzip.compress(bytes(range(256)) * 20)
    (tmp_path / "bad.csv.gz").write_bytes(packed[:60] + b"damaged" + packed[67:])
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    (tmp_path / "few.csv").write_text("file,patient,finding\n000.png,1,clear\n001.png,2,sick\n")
    before = tree(tmp_path)
    more, expected = ERRORS[name]
    assert expected in only_error(quick("prepare.py", *argv, *more, cwd=tmp_path))
    assert tree(tmp_path) == before


def test_ctrl_c_leaves_nothing_behind(tmp_path):
    argv = small(tmp_path, 2000)
    process = start("prepare.py", *argv, "--copy", cwd=tmp_path)
    while process.poll() is None and not list(tmp_path.glob("data/.SET.*/SET/train/*/*")):
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert "interrupted" in err and "Traceback" not in err and process.returncode != 0
    assert os.listdir(tmp_path / "data") == []
