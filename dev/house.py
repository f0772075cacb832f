"""Is the house still small? Prints its sizes beside their bounds, and fails above one.

    python dev/house.py

The reading path is what one reads to understand training: the stages, the files that they are made
of, and those functions and classes of lib/ that these call by name.
"""
import ast
import pathlib
import subprocess
import sys

PATH = ("train_vae.py", "find_latent_scale.py", "train_ldm.py", "sample.py", "model.py",
        "diffusion.py", "data.py", "memorisation.py")
# What sections 8 to 10 of the design add to the program that 6,900 lines were meant for.
ADDED = ("add", "either", "both", "product", "per_image", "compose", "Composition", "float_list",
         "prepare_composition", "describe", "draw_effusion", "invert", "edit", "prepare_edit",
         "edit_rows", "planted_copies", "denoising_errors", "diffusion_classifier", "membership")


def names_from_lib(tree):
    """{(module of lib/, name)} that a parsed file takes from lib/."""
    modules, names = {}, set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "lib":
            modules |= {alias.asname or alias.name: alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lib."):
            names |= {(node.module[4:], alias.name) for alias in node.names}
    return names | {(modules[node.value.id], node.attr) for node in ast.walk(tree) if
                    isinstance(node, ast.Attribute) and getattr(node.value, "id", "") in modules}


def length(node):
    """Lines of a function or class, decorators included."""
    return node.end_lineno - min([node.lineno, *(d.lineno for d in node.decorator_list)]) + 1


def main():
    root = pathlib.Path(__file__).resolve().parent.parent
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", "*.py", "docs/*.md"],
                            cwd=root, text=True, capture_output=True, check=True).stdout.split()
    texts = {name: (root / name).read_text() for name in listed if (root / name).exists()}
    trees = {name: ast.parse(text) for name, text in texts.items() if name.endswith(".py")}
    lines = {name: len(texts[name].splitlines()) for name in trees}
    product = {name: tree for name, tree in trees.items() if not name.startswith("tests/")}
    in_all = sum(lines[name] for name in product)
    added = lines["prepare.py"] + lines["lib/tables.py"] + sum(
        length(node) for tree in product.values() for node in tree.body
        if getattr(node, "name", None) in ADDED)
    called = set().union(*(names_from_lib(trees[name]) for name in PATH))
    path = sum(map(lines.get, PATH)) + sum(
        length(node) for name, tree in product.items() if name.startswith("lib/")
        for node in tree.body if (name[4:-3], getattr(node, "name", None)) in called)
    functions = sorted((length(node), f"{node.name} in {name}") for name, tree in product.items()
                       for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))
    longest_main = [f for f in functions if f[1].startswith("main in ")][-1]
    longest = [f for f in functions if not f[1].startswith("main in ")][-1]
    words = sum(len(text.split()) for name, text in texts.items()
                if name.endswith(".md") and name != "docs/log.md")
    figures = [
        ("lines of product Python without preparing, composing, editing", in_all - added, 6900),
        ("lines of product Python", in_all, 7400), ("lines of the reading path", path, 3700),
        (f"lines of {longest_main[1]}", longest_main[0], 130),
        (f"lines of {longest[1]}", longest[0], 80),
        ("names that train_ldm.py takes from lib/", len(names_from_lib(trees["train_ldm.py"])), 20),
        ("Python files at the top level", len([n for n in product if "/" not in n]), 12),
        ("lines of tests", sum(lines.values()) - in_all, 9200),
        ("words of docs without docs/log.md", words, 8000)]
    for what, value, bound in figures:
        print(f"{'ok ' if value <= bound else 'BAD'} {value:6,d} (at most {bound:5,d})  {what}")
    sys.exit(any(value > bound for _, value, bound in figures))


if __name__ == "__main__":
    main()
