"""The files that say what is needed, where it is and whose it is agree with each other."""

import ast
import re
import tomllib
from pathlib import Path

import jupytext
import pytest
import yaml
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

import bnnbook

ROOT = Path(__file__).resolve().parent.parent
PYTHONS = ["3.11", "3.12", "3.13"]
LOCK = (ROOT / "requirements.lock").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CONDA = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
COLAB = (ROOT / "tests" / "colab-pins.txt").read_text(encoding="utf-8")


def linux(python: str) -> dict[str, str]:
    """The environment that markers ask for, on Linux with this Python."""
    ours = {"python_version": python, "python_full_version": f"{python}.5"}
    system = {"sys_platform": "linux", "platform_system": "Linux", "os_name": "posix"}
    return {**default_environment(), **ours, **system, "implementation_name": "cpython"}


def pins(text: str, python: str = "3.12") -> dict[str, list[Version]]:
    """The pinned versions of each package that one environment installs."""
    found: dict[str, list[Version]] = {}
    for line in text.splitlines():
        line = line.partition("#")[0].strip()
        if not line or line.startswith("-"):
            continue
        pin = Requirement(line)
        exact = re.fullmatch(r"==([^,*]+)", str(pin.specifier))
        assert exact, f"{line}: a lock holds exact versions"
        if pin.marker is None or pin.marker.evaluate(linux(python)):
            found.setdefault(canonicalize_name(pin.name), []).append(Version(exact[1]))
    return found


def requirements(project: dict, python: str) -> list[Requirement]:
    """What a project needs under this Python, the extras included."""
    texts = [*project["dependencies"]]
    for extra in project.get("optional-dependencies", {}).values():
        texts += extra
    needed = map(Requirement, texts)
    return [r for r in needed if r.marker is None or r.marker.evaluate(linux(python))]


def unmet(needed: list[Requirement], pinned: dict[str, list[Version]]) -> list[str]:
    """The requirements that no pin meets, and the packages pinned twice."""
    wrong = [f"{name} is pinned twice" for name, versions in pinned.items() if len(versions) > 1]
    for requirement in needed:
        versions = pinned.get(canonicalize_name(requirement.name), [])
        if not any(requirement.specifier.contains(v, prereleases=True) for v in versions):
            wrong.append(f"{requirement} is not met by {[str(v) for v in versions]}")
    return wrong


@pytest.mark.parametrize("python", PYTHONS)
def test_the_lock_meets_every_requirement(python):
    assert unmet(requirements(PROJECT, python), pins(LOCK, python)) == []
    assert SpecifierSet(PROJECT["requires-python"]).contains(f"{python}.5")


def test_supported_pythons_are_the_declared_ones():
    start = "Programming Language :: Python :: 3."
    named = [c.rpartition(" ")[2] for c in PROJECT["classifiers"] if c.startswith(start)]
    assert named == PYTHONS


@pytest.mark.parametrize(
    ("lock", "message"),
    [
        ("torch==2.11.0", "numpy>=2 is not met by []"),
        ("numpy==1.26.4", "numpy>=2 is not met by ['1.26.4']"),
        ("numpy==2.1.0\nNumPy==2.2.0", "numpy is pinned twice"),
        ("numpy==2.1.0 ; python_version < '3.12'", "numpy>=2 is not met by []"),
        ("numpy==2.1.0 ; sys_platform == 'win32'", "numpy>=2 is not met by []"),
        ("numpy==2.1.0 ; python_full_version == '3.12.*'", None),
    ],
)
def test_a_lock_that_has_drifted_is_seen(lock, message):
    project = {"dependencies": [], "optional-dependencies": {"book": ["numpy>=2"]}}
    wrong = unmet(requirements(project, "3.12"), pins(lock, "3.12"))
    assert wrong == ([message] if message else [])


def test_a_lock_without_exact_versions_is_seen():
    with pytest.raises(AssertionError, match="exact versions"):
        pins("numpy>=2")


def test_environment_yml_is_thin_and_names_extras_that_exist():
    conda = [name for name in CONDA["dependencies"] if isinstance(name, str)]
    (pip,) = [entry["pip"] for entry in CONDA["dependencies"] if isinstance(entry, dict)]
    assert CONDA["channels"] == ["conda-forge"]
    assert [name.partition("=")[0] for name in conda] == ["python", "pip"]
    (editable,) = pip
    extras = re.fullmatch(r"-e \.\[([a-z,]+)\]", editable)
    assert extras
    assert set(extras[1].split(",")) == set(PROJECT["optional-dependencies"])
    assert conda[0].partition("=")[2].lstrip("=") in PYTHONS


def test_the_library_runs_with_what_colab_has():
    colab = pins(COLAB)
    (python,) = colab.pop("python")
    assert SpecifierSet(PROJECT["requires-python"]).contains(python)
    assert f"{python.major}.{python.minor}" in PYTHONS
    needed = [Requirement(text) for text in PROJECT["dependencies"]]
    known = [r for r in needed if canonicalize_name(r.name) in colab]
    assert {r.name for r in known} == set(colab)  # a pin that we do not need is a mistake too
    assert unmet(known, colab) == []


def test_colab_bounds_that_are_too_high_are_seen():
    assert unmet([Requirement("numpy>=2.2")], pins(COLAB)) != []


# Where the project is, and which version: written in several files, the same in all.

ADDRESS = PROJECT["urls"]["Repository"]
SITE = PROJECT["urls"]["Homepage"]
WRITTEN_IN = [
    "README.md", "CITATION.cff", "_config.yml", "LICENSE-text",
    "book/intro.md", "book/colab.md", "book/own-code.md", "book/binaryconnect.md",
]  # fmt: skip
ADDRESSES = re.compile(r"(?:https?://|git\+https://|/)github(?:\.com)?/([\w.-]+/[\w.-]+)")
OURS = re.compile(r"bnnbook$|/bnnbook\b")


def repositories(text: str) -> set[str]:
    """The repositories that a text names as this project's, as owner/name."""
    found = {name.removesuffix(".git").rstrip(".") for name in ADDRESSES.findall(text)}
    return {name for name in found if OURS.search(name)}


@pytest.mark.parametrize("name", WRITTEN_IN)
def test_the_repository_is_the_same_everywhere(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    assert repositories(text) == {ADDRESS.removeprefix("https://github.com/")}


def test_the_library_names_the_same_repository():
    assert bnnbook.REPOSITORY == ADDRESS


def test_another_repository_is_seen():
    text = "https://github.com/fork/bnnbook and /github/other/bnnbook/blob, not github.com/a/b"
    assert repositories(text) == {"fork/bnnbook", "other/bnnbook"}


def test_the_site_is_the_same_everywhere():
    config = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))
    assert config["html"]["baseurl"] == SITE
    assert config["repository"]["url"] == ADDRESS
    assert cff()["url"] == SITE
    assert SITE in (ROOT / "README.md").read_text(encoding="utf-8")


def tags(text: str) -> set[str]:
    """The releases that installation lines of a text ask for."""
    return set(re.findall(rf"git\+{re.escape(ADDRESS)}@(\S+?)[\"'\s]", text))


def test_the_version_is_the_same_everywhere():
    version = PROJECT["version"]
    assert bnnbook.__version__ == version
    assert str(cff()["version"]) == version
    for name in ("README.md", "book/colab.md", "book/binaryconnect.md"):
        assert tags((ROOT / name).read_text(encoding="utf-8")) == {f"v{version}"}, name


def chapters() -> list[Path]:
    """The sources of the chapters that the table of contents names."""
    names = re.findall(
        r"notebooks/([\w-]+)\.ipynb", (ROOT / "_toc.yml").read_text(encoding="utf-8")
    )
    return [ROOT / "book" / f"{name}.md" for name in names]


@pytest.mark.parametrize("path", chapters(), ids=lambda path: path.stem)
def test_a_chapter_installs_that_version_on_colab_only(path):
    cells = jupytext.read(path, fmt="md:myst").cells
    first = next(cell.source for cell in cells if cell.cell_type == "code")
    assert tags(first) == {f"v{PROJECT['version']}"}
    assert '"google.colab" in sys.modules' in first
    assert "--no-deps" in first


@pytest.mark.parametrize("path", chapters(), ids=lambda path: path.stem)
def test_the_source_of_a_chapter_is_no_page_of_its_own(path):
    config = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))
    assert path.relative_to(ROOT).as_posix() in config["exclude_patterns"]


def cff() -> dict:
    return yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))


def cff_mistakes(citation: dict) -> list[str]:
    """What the Citation File Format 1.2.0 would refuse, as far as this file uses it."""
    wrong = [
        key for key in ("cff-version", "message", "title", "authors") if not citation.get(key)
    ]
    known = {
        "cff-version", "message", "title", "type", "authors", "version", "license", "url",
        "repository-code", "keywords", "abstract", "date-released", "doi", "identifiers",
        "references", "preferred-citation", "contact", "commit", "license-url", "repository",
    }  # fmt: skip
    wrong += sorted(set(citation) - known)
    wrong += ["cff-version"] if citation.get("cff-version") != "1.2.0" else []
    wrong += ["type"] if citation.get("type", "software") not in ("software", "dataset") else []
    for author in citation.get("authors") or []:
        person = {"family-names", "given-names", "name-particle", "orcid", "affiliation"}
        entity = {"name", "website", "email"}
        if not author or not (
            set(author) <= person or ("name" in author and set(author) <= entity)
        ):
            wrong.append(f"authors: {author}")
    return wrong


def test_citation_is_valid():
    assert cff_mistakes(cff()) == []
    assert cff()["license"] == PROJECT["license"]


@pytest.mark.parametrize(
    "change",
    [{"title": ""}, {"authors": []}, {"cff-version": "1.1.0"}, {"type": "book"}, {"titel": "x"},
     {"authors": [{"nom": "x"}]}],
)  # fmt: skip
def test_a_mistake_in_the_citation_is_seen(change):
    assert cff_mistakes(cff() | change) != []


def test_both_licences_are_there_in_full():
    assert (ROOT / "LICENSE").read_text(encoding="utf-8").startswith("MIT License")
    text = (ROOT / "LICENSE-text").read_text(encoding="utf-8")
    assert "Attribution 4.0 International" in text
    assert "Section 8 -- Interpretation." in text


def workflow(name: str) -> dict:
    text = (ROOT / ".github" / "workflows" / name).read_text(encoding="utf-8")
    return yaml.safe_load(text)


def commands(job: dict) -> list[str]:
    return [step["run"] for step in job["steps"] if "run" in step]


def test_the_workflows_run_the_commands_of_the_readme():
    test = workflow("ci.yml")["jobs"]["test"]
    assert commands(test) == ["bash .ci/run"]
    assert set(test["strategy"]["matrix"]["python"]) <= set(PYTHONS)
    publish = commands(workflow("pages.yml")["jobs"]["build"])
    # what was committed is published, strictly built; a stale chapter is an error, not executed
    assert publish[:3] == [
        "make setup", ".venv/bin/python -m tools.chapters build --check", "make site STRICT=1"
    ]  # fmt: skip


def test_the_example_of_the_readme_runs(capsys):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    names = {}
    exec(compile(ast.parse(example), "README.md", "exec"), names)
    assert names["history"].frame["test_accuracy"].iloc[-1] > 0.5  # chance is 0.1
    assert "test_accuracy" in capsys.readouterr().out
